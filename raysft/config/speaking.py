"""The sections of the config that say how a model speaks, once it is trained: `speak`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from raysft.config.marks import Free
from raysft.config.prepare import Speakers, UnitsOfModels
from raysft.config.section import Section


class Flow(Section):
    """How noise becomes frames of speech."""

    steps: Free[PositiveInt] = Field(10, description="steps from noise to speech")
    solver: Free[Literal["euler", "heun"]] = Field(
        "euler", description="euler: one look at the network a step; heun: two"
    )
    schedule: Free[Literal["uniform", "cosine", "sway", "ming"]] = Field(
        "uniform",
        description="where the steps are; uniform; cosine (CosyVoice) and sway (F5-TTS): most near "
        "the noise; ming: the 10 of Ming-UniAudio, with sway",
    )
    sway: Free[float] = Field(-1.0, description="schedules sway and ming: how much", ge=-1, le=1)
    guidance: Free[NonNegativeFloat] = Field(
        0.0, description="how far away from what would be said without a condition"
    )
    noise: Free[NonNegativeFloat] = Field(
        0.0, description="that is added after each step (Ming-UniAudio: 0.25)"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.schedule == "ming" and self.steps != 10:
            raise ValueError(f"schedule ming has 10 steps, found steps: {self.steps}")
        return self


class Speak(Section):
    """How a model speaks."""

    flow: Flow = Field(default_factory=Flow, description="how noise becomes speech")
    seed: Free[NonNegativeInt] = Field(
        0, description="of the noise; with the same seed the same is said, whatever is said beside"
    )
    max_seconds: Free[PositiveFloat] = Field(30.0, description="of what is said, at most")
    min_seconds: Free[NonNegativeFloat] = Field(0.0, description="before which nothing stops")
    stop: Free[float] = Field(
        0.5, description="patch_lm: probability from which a patch is the last", gt=0, le=1
    )
    speech_tokens: Free[UnitsOfModels | None] = Field(
        None,
        description="what makes units of the clips that are heard, as prepare.speech_tokens made "
        "those that were learnt; default: data.speech_tokens of the run",
    )
    speakers: Free[Speakers | None] = Field(
        None,
        description="what makes embeddings of the voice that is spoken in, for a flow decoder that "
        "reads one, as prepare.speakers made those that were learnt",
    )
    vocoder: Free[str] = Field(
        "griffin_lim",
        description="what makes sound of mel spectrograms; griffin_lim, or a folder (or hub id) of "
        "SpeechT5's HiFi-GAN or of UnivNet",
    )
