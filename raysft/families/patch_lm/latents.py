"""Latents: the frames of a clip that patches are cut from.

Under `encode`, in the data tasks. A kind says how many frames a clip of so many samples has, and
what they are.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from raysft.config.mel import Mel
from raysft.config.patches import Patches
from raysft.data.clips import mels
from raysft.errors import UserError
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


def latents_of(patches: Patches) -> Latents:
    """What `model.patches` asks for. Raises UserError where it does not say it."""
    if patches.mel is None:
        raise UserError(
            "model.patches.mel: say which log-mel spectrograms are patches, such as {preset: step}"
        )
    return MelLatents(patches.mel)
