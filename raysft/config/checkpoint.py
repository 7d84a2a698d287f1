"""The section `checkpoint`: when state is saved, and what a start does with it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raysft.config.marks import Fixed, Free, PathKey
from raysft.config.section import Section
from raysft.scorers import figure_of


class Checkpoint(Section):
    """When state is saved, and what a start does with it."""

    every: Free[NonNegativeInt] = Field(
        500, description="steps between checkpoints; 0: only at the end"
    )
    keep: Free[PositiveInt] = Field(2, description="checkpoints kept: the last ones")
    best: Free[str | None] = Field(
        None,
        description="evaluation metric whose best checkpoint is kept as well: wer/dev, loss/asr; a "
        "kind alone (loss, wer) is the mean over its tasks or sources",
    )
    best_mode: Free[Literal["min", "max"]] = Field(
        "min",
        description="min: the lowest value is the best; left out: what the metric's scorer says",
    )
    path: Fixed[Annotated[str | None, PathKey("store")]] = Field(
        None,
        description="folder or URL (s3://...) below which checkpoints go, in a folder of the run's "
        "name; relative: below run.storage_path; default: the run's folder",
    )
    resume: Free[Literal["auto", "weights_only", "never"]] = Field(
        "auto",
        description="of a run that is there already: auto continues it; weights_only begins anew "
        "with its weights; never refuses",
    )
    grace_s: Free[PositiveFloat] = Field(
        30.0, description="seconds to save in on Ctrl-C, SIGTERM or a notice of pre-emption"
    )

    @model_validator(mode="after")
    def _mode_of_metric(self) -> Self:
        if self.best is not None and "best_mode" not in self.model_fields_set:
            self.best_mode = figure_of(self.best).better
        return self
