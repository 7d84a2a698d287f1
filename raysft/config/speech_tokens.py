"""The section of the config that makes units of clips: `data.speech_tokens`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from raysft.config import listeners
from raysft.config.marks import Fixed, PathKey
from raysft.config.section import Section


class SpeechTokens(Section):
    """The tokenizer that turns audio into discrete units, for causal_lm."""

    method: Fixed[Literal["kmeans"]] = Field(
        "kmeans", description="k-means over stacked feature frames"
    )
    clusters: Fixed[PositiveInt] = Field(100, description="number of units")
    features: Fixed[Literal["log_mel", "fbank"]] = Field("log_mel", description="what is clustered")
    mels: Fixed[PositiveInt] = Field(80, description="mel bins")
    stack: Fixed[PositiveInt] = Field(
        4, description="frames of 10 ms joined into one unit (4 = 25 Hz)"
    )
    fit_clips: Fixed[PositiveInt] = Field(500, description="clips the centroids are fitted on")
    path: Fixed[Annotated[str | None, PathKey()]] = Field(
        None, description="fitted centroids (safetensors); default: fitted once into the run folder"
    )

    @field_validator("method", mode="before")
    @classmethod
    def _of_a_run(cls, value: object) -> object:
        if value != "kmeans" and value in listeners.tokens():
            raise ValueError(
                f"a run makes tokens by k-means over mel frames alone; {value} is a method of "
                "prepare.speech_tokens: make shards with it (prepare), and train on their data.list"
            )
        return value
