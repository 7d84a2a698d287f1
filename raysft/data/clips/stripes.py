"""SpecAugment: stripes of a clip's features are masked (Park et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysft.config.augment import Spec


@dataclass(frozen=True)
class Spectrogram:
    """Where among a clip's arrays its features are: [frames + tail, stacked * mels], or rows of
    chunks, [rows, mels, frames].

    stacked: frames of mels beside each other in each of its frames. tail: frames behind the clip.
    hop: samples of a frame, of rows.
    """

    name: str
    stacked: int = 1
    tail: int = 0
    hop: int = 0

    def masked(
        self, features: np.ndarray, samples: int, spec: Spec, rng: np.random.Generator
    ) -> np.ndarray:
        """A copy in which stripes are masked, as `spec` says. samples: of the clip."""
        if features.ndim == 2:
            found = features.copy()
            frames = found.reshape(len(found), self.stacked, -1)
            stripes(frames, len(found) - self.tail, spec, rng)
            return found
        rows, mels, long = features.shape
        found = features.transpose(0, 2, 1).reshape(rows * long, 1, mels)  # a copy
        stripes(found, min(rows * long, -(-samples // self.hop)), spec, rng)
        return np.ascontiguousarray(found.reshape(rows, long, mels).transpose(0, 2, 1))


def stripes(frames: np.ndarray, count: int, spec: Spec, rng: np.random.Generator) -> None:
    """SpecAugment, in place: stripes of [frames, stacked, mels] become the mean of the clip's own.

    count: frames that are the clip's own; those behind it have stripes of mels only. A stripe is
    from nothing to its greatest width, and anywhere, each as likely as any other (Park et al.
    2019, section 2; without time warping).
    """
    mean = frames[:count].mean(dtype=np.float64)
    mels = frames.shape[2]
    for _ in range(spec.freq_masks):
        width = int(rng.integers(min(spec.freq_width, mels) + 1))
        first = int(rng.integers(mels - width + 1))
        frames[:, :, first : first + width] = mean
    for _ in range(spec.time_masks):
        width = int(rng.integers(int(spec.time_width * count) + 1))
        first = int(rng.integers(count - width + 1))
        frames[first : first + width] = mean
