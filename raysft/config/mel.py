"""The section of the config that says which log-mel a vocoder reads: `mel`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from raysft.config.marks import Weights
from raysft.config.section import Section
from raysft.json_types import Json, JsonObject

Preset = Literal["step", "usdm"]

_PRESETS: dict[str, JsonObject] = {
    "step": {},  # the defaults of the fields
    "usdm": {
        "rate": 22050,
        "n_fft": 1024,
        "win": 1024,
        "hop": 256,
        "mean": -5.5419,
        "std": 2.1575,
    },
}


class Mel(Section):
    """The log-mel that a vocoder reads, and so what is learnt to be made for it."""

    preset: Weights[Preset] = Field(
        "step",
        description="gives what is left out here; step: 24 kHz, 50 frames a second (CosyVoice's "
        "vocoder); usdm: 22.05 kHz, normalised (BigVGAN's)",
    )
    rate: Weights[PositiveInt] = Field(24000, description="Hz of clips")
    n_fft: Weights[PositiveInt] = Field(1920, description="samples of a Fourier transform")
    win: Weights[PositiveInt] = Field(1920, description="samples of the Hann window")
    hop: Weights[PositiveInt] = Field(480, description="samples from a frame to the next")
    bins: Weights[PositiveInt] = Field(80, description="mel bins")
    fmin: Weights[NonNegativeFloat] = Field(0.0, description="Hz where the first bin begins")
    fmax: Weights[PositiveFloat] = Field(8000.0, description="Hz where the last bin ends")
    floor: Weights[PositiveFloat] = Field(1e-5, description="magnitudes below it count as it")
    mean: Weights[float] = Field(0.0, description="taken off each value")
    std: Weights[PositiveFloat] = Field(1.0, description="that each value is then divided by")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Json) -> Json:
        if not isinstance(given, dict):
            return given
        preset = given.get("preset", "step")
        return {**_PRESETS.get(preset, {}), **given} if isinstance(preset, str) else given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.win > self.n_fft:
            raise ValueError(f"win {self.win} is longer than n_fft {self.n_fft}")
        if self.hop > self.n_fft:
            raise ValueError(f"hop {self.hop} is longer than n_fft {self.n_fft}")
        if not self.fmin < self.fmax <= self.rate / 2:
            raise ValueError(
                f"fmin {self.fmin:g} Hz to fmax {self.fmax:g} Hz: expected to rise, and to end at "
                f"half the rate ({self.rate / 2:g} Hz) at most"
            )
        return self

    @property
    def frames_per_second(self) -> float:
        """Frame rate."""
        return self.rate / self.hop
