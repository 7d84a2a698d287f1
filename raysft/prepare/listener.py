"""What hears a clip and makes of it tokens, or an embedding of who speaks.

One clip at a time, always: what a batch holds beside a clip, its padding and the order of its sums
change the last bits of what a model makes of it, and now and then a token. A GPU is kept busy by
several makers that share it (prepare.gpus).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from raysft.config.prepare import UnitsOfModels

TRIM_FRAME, TRIM_HOP = 2048, 512  # samples, of librosa.effects.trim
KEPT_BEFORE_S, KEPT_BEHIND_S = 0.05, 0.22


class Listener(ABC):
    """A row of `raysft.config.listeners`, made with its section's settings and the preparation's
    folder. sample_rate: Hz of the clips it is given."""

    sample_rate: int

    @abstractmethod
    def hear(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] at sample_rate -> int32 [tokens], or float32 [dimensions].

        Raises BadExample where the clip is too short, UserError where the model is at fault.
        """


class Fitted(Listener):
    """One that is fitted on clips of the corpus before anything is made with it."""

    @classmethod
    @abstractmethod
    def is_fitted(cls, settings: UnitsOfModels, folder: Path) -> bool:
        """Whether what it needs is there."""

    @classmethod
    @abstractmethod
    def fit(
        cls, settings: UnitsOfModels, folder: Path, clips: Iterable[np.ndarray], seed: int
    ) -> None:
        """Make it, whole or not at all, of clips at `rate`. Raises UserError."""

    @classmethod
    @abstractmethod
    def rate(cls, settings: UnitsOfModels) -> int:
        """Hz of the clips it is fitted on."""


class Tokens:
    """A listener's tokens, with what prepare.speech_tokens says of clips before and of runs
    behind."""

    def __init__(self, listener: Listener, settings: UnitsOfModels) -> None:
        self.listener, self.settings = listener, settings
        self.sample_rate = listener.sample_rate

    def tokens(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> int32 [tokens]."""
        found = self.listener.hear(cleaned(clip, self.sample_rate, self.settings))
        return deduplicated(found) if self.settings.dedup else found


def cleaned(clip: np.ndarray, rate: int, settings: UnitsOfModels) -> np.ndarray:
    """A clip at its peak, without silence at its ends, as far as the settings say so."""
    if settings.peak is not None and (loudest := float(np.abs(clip).max())) > 0:
        clip = clip * np.float32(settings.peak / loudest)
    if settings.trim_db is not None:
        clip = trimmed(clip, rate, settings.trim_db)
    return clip


def trimmed(clip: np.ndarray, rate: int, below_db: float) -> np.ndarray:
    """Without what is more than `below_db` below the loudest frame, at both ends, but for a margin.

    As librosa.effects.trim: the root mean square of frames of 2048 samples each 512, centred, of a
    clip with zeros around it. A clip of zeros stays.
    """
    padded = np.pad(clip, TRIM_FRAME // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, TRIM_FRAME)[::TRIM_HOP]
    power = np.square(frames, dtype=np.float64).mean(axis=1)
    heard = np.flatnonzero(power > power.max() * 10 ** (-below_db / 10))
    if not len(heard):
        return clip
    start = int(heard[0]) * TRIM_HOP - int(KEPT_BEFORE_S * rate)
    stop = (int(heard[-1]) + 1) * TRIM_HOP + int(KEPT_BEHIND_S * rate)
    return np.ascontiguousarray(clip[max(0, start) : stop])


def deduplicated(tokens: np.ndarray) -> np.ndarray:
    """[tokens] with each run of the same token once."""
    keep = np.ones(len(tokens), bool)
    keep[1:] = tokens[1:] != tokens[:-1]
    return tokens[keep]
