"""The section of an entry that says how its ratings are asked for: `judging`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raysft.config.marks import PathKey
from raysft.config.section import Section

_READ = PathKey("data", read=True)

Dataset = Literal[
    "ROLE",
    "RoleVariation",
    "RoleReasoning",
    "RoleCaption",
    "RoleEmotion",
    "RoleVariationCaption",
    "RoleAllFixOrder",
    "RoleAllFixOrderConsistent",
    "RoleAllFlexOrder",
    "RoleAllFlexOrderConsistent",
    "Arche",
    "AVQA",
]


class Judging(Section):
    """How the records of a drama corpus become questions."""

    dataset: Dataset | None = Field(
        None,
        description="what its lines are asked as, whatever their dataset_name; default: that, else "
        "Arche where there is a question, AVQA where there are choices, ROLE",
    )
    rubrics: Annotated[str | None, _READ] = Field(
        None, description="a YAML file in the place of raysft/data/rubrics/role.yaml or arche.yaml"
    )
    variations: Annotated[str | None, _READ] = Field(
        None, description="a JSON file of prompts by dimension, of which one is drawn at each use"
    )
    dimensions: list[str] | None = Field(
        None, min_length=1, description="those that are asked about; default: all of the rubrics"
    )
    not_applicable: Literal["left_out", "lowest"] = Field(
        "left_out", description="what a rating of N/A is: none, or the lowest (Speech-DRAME)"
    )

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        for key in ("rubrics", "variations", "dimensions"):
            if self.dataset == "AVQA" and getattr(self, key) is not None:
                raise ValueError(f"{key}: AVQA asks its own questions and reads none: leave it out")
        if self.dataset and "All" in self.dataset and self.variations is not None:
            raise ValueError(
                f"variations: {self.dataset} asks about all dimensions in one rubric and reads "
                "none: leave it out"
            )
        return self
