"""Latents: the frames of a clip that patches are cut from.

Under `encode`, in the data tasks. A kind says how many frames a clip of so many samples has, and
what they are.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from raysft.config.mel import Mel
from raysft.config.patches import Codec, Column, Patches
from raysft.data.clips import mels
from raysft.errors import UserError
from raysft.families.patch_lm.codecs import CodecLatents
from raysft.json_types import JsonObject


class Latents(Protocol):
    """Makes frames of clips. rate: Hz of the clips. width: values of a frame."""

    rate: int
    width: int
    frames_per_second: float

    def frames(self, samples: int) -> int:
        """Of a clip of so many samples."""

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> float32 [frames, width]."""

    @property
    def facts(self) -> JsonObject:
        """What an exported model has to know of them: `latents` of its config.json."""

    @property
    def identity(self) -> JsonObject:
        """What decides the frames of a clip."""


class MelLatents:
    """Log-mel frames."""

    def __init__(self, settings: Mel) -> None:
        self.settings = settings
        self.rate, self.width = settings.rate, settings.bins
        self.frames_per_second = settings.frames_per_second

    def frames(self, samples: int) -> int:
        """As `mels.frames`."""
        return mels.frames(samples, self.settings)

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """As `mels.log_mel`."""
        return mels.log_mel(clip, self.settings)

    @property
    def facts(self) -> JsonObject:
        """Its settings."""
        return {"mel": self.settings.model_dump()}

    @property
    def identity(self) -> JsonObject:
        """Its settings."""
        return self.facts


class ColumnLatents:
    """Latents that the data brings, normalised. A "clip" is their values, one after the other:
    `rate` counts those of a second."""

    def __init__(self, settings: Column, codec: Codec | None) -> None:
        """codec: what makes waves of them; None: nothing does. Raises UserError where they do not
        go together."""
        self.settings, self.width = settings, settings.width
        self.frames_per_second = settings.rate
        self.rate = round(settings.rate * settings.width)
        if self.rate != settings.rate * settings.width:
            raise UserError(
                f"model.patches.column: rate {settings.rate:g} times width {settings.width} is no "
                "whole number of values a second: say the rate of other frames"
            )
        self.codec = None if codec is None else self._fitting(codec)

    def _fitting(self, codec: Codec) -> CodecLatents:
        own = self.settings
        if (codec.mean, codec.std) != (0.0, 1.0):
            raise UserError(
                "model.patches.codec.mean, std: latents of a column are normalised by "
                "model.patches.column.mean and std: say them there"
            )
        found = CodecLatents(codec.model_copy(update={"mean": own.mean, "std": own.std}))
        for key, value, wanted in (
            ("width", own.width, found.width),
            ("rate", own.rate, found.frames_per_second),
        ):
            if value != wanted:
                raise UserError(
                    f"model.patches.column.{key}: {value:g}, but the codec at {codec.path} has "
                    f"{wanted:g}: name the codec that made them, or leave model.patches.codec out"
                )
        return found

    def frames(self, samples: int) -> int:
        """Of so many values."""
        return samples // self.width

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """float32 [frames * width] -> float32 [frames, width]."""
        mean, std = np.float32(self.settings.mean), np.float32(self.settings.std)
        return (clip.reshape(-1, self.width) - mean) / std

    def raw(self, frames: np.ndarray) -> np.ndarray:
        """As the data has them."""
        return frames * np.float32(self.settings.std) + np.float32(self.settings.mean)

    @property
    def facts(self) -> JsonObject:
        """Its settings, and which codec makes waves of them."""
        told: JsonObject = {"column": self.settings.model_dump()}
        if self.codec is not None:
            told["codec"] = {"path": self.codec.settings.path}
        return told

    @property
    def identity(self) -> JsonObject:
        """Its settings."""
        return {"column": self.settings.model_dump()}


def latents_of(patches: Patches) -> Latents:
    """What `model.patches` asks for. Raises UserError where it does not say it, or says it twice;
    and where a codec is another than it says."""
    other = "codec" if patches.codec is not None else "column"
    if patches.mel is not None and (patches.codec is not None or patches.column is not None):
        raise UserError(
            f"model.patches: frames are of one kind, and both mel and {other} are given: leave one "
            "out"
        )
    if patches.column is not None:
        return ColumnLatents(patches.column, patches.codec)
    if patches.codec is not None:
        return CodecLatents(patches.codec)
    if patches.mel is None:
        raise UserError(
            "model.patches.mel: say which log-mel spectrograms are patches, such as {preset: "
            "step}; or which codec's latents: codec: {path: FOLDER}"
        )
    return MelLatents(patches.mel)
