"""Speech tokens by ONNX models, one or several streams of them in turn.

Step's two codebooks are two streams, 16.67 and 25 tokens a second, two of the first and three of
the second in turn (pattern [2, 3]): 5 tokens each 120 ms. Ids of a stream follow those of the one
before, and what does not fill a last turn is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raysft.config.listeners import TOKENS
from raysft.config.prepare import TokenStream, UnitsOfModels
from raysft.errors import BadExample, UserError
from raysft.prepare.features import FEATURES, RATE
from raysft.prepare.listener import Listener
from raysft.prepare.onnx_model import OnnxModel

SHORTEST = 480  # samples of a last chunk: what is shorter is left out
SLACK = 2  # tokens that a chunk may have more or less than its rate says


class Stream:
    """One model."""

    def __init__(self, key: str, settings: TokenStream) -> None:
        self.key, self.settings = key, settings
        self.model = OnnxModel(f"{key}.path", settings.path)
        self.features = FEATURES[settings.features]()
        self.centroids = None
        if settings.centroids is not None:
            self.centroids = _centroids(key, settings)
            self._half_squares = (self.centroids**2).sum(axis=1) / 2

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> int64 [tokens], of 0 .. codes - 1."""
        size = len(clip)
        if self.settings.chunk_s is not None:
            size = round(self.settings.chunk_s * RATE)
        chunks = [clip[start : start + size] for start in range(0, len(clip), size)]
        found = [self._of(chunk) for chunk in chunks if len(chunk) >= SHORTEST]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _of(self, chunk: np.ndarray) -> np.ndarray:
        made = self.model.hear(chunk, self.features)
        where = f"{self.key}.path: {self.settings.path}"
        if self.centroids is not None:
            frames = made.reshape(-1, made.shape[-1])
            if frames.shape[1] != self.centroids.shape[1]:
                raise UserError(
                    f"{self.key}.centroids: of {self.centroids.shape[1]} values, and {where} makes "
                    f"frames of {frames.shape[1]}"
                )
            scores = frames.astype(np.float32) @ self.centroids.T - self._half_squares
            codes = scores.argmax(axis=1)
        elif np.issubdtype(made.dtype, np.integer):
            codes = made.reshape(-1).astype(np.int64)
        else:
            raise UserError(
                f"{where} makes {made.dtype} of {list(made.shape)}, no tokens: give their "
                f"centroids ({self.key}.centroids)"
            )
        if len(codes) and (codes.min() < 0 or codes.max() >= self.settings.codes):
            raise UserError(
                f"{where} makes token {int(codes.max() if codes.max() > 0 else codes.min())}, "
                f"outside of 0 .. {self.key}.codes - 1 = {self.settings.codes - 1}"
            )
        rate, seconds = self.settings.rate, len(chunk) / RATE
        if rate is not None and abs(len(codes) - rate * seconds) > SLACK:
            raise UserError(
                f"{where} makes {len(codes)} tokens of {seconds:.2f} s, and {self.key}.rate = "
                f"{rate:g} says {rate * seconds:.1f}"
            )
        return codes


class Streams(Listener):
    """Tokens of all streams, as one sequence."""

    sample_rate = RATE

    def __init__(self, settings: UnitsOfModels, folder: Path) -> None:
        """Raises UserError: a model that cannot be used, a pattern that fits no such streams."""
        check(settings)
        self.streams = [
            Stream(f"{TOKENS}.streams.{number}", one) for number, one in enumerate(settings.streams)
        ]
        sizes = [one.codes for one in settings.streams]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.pattern = settings.pattern if isinstance(settings.pattern, list) else None

    def hear(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> int32 [tokens]."""
        found = [
            stream(clip) + offset
            for stream, offset in zip(self.streams, self.offsets.tolist(), strict=True)
        ]
        tokens = np.concatenate(found) if self.pattern is None else in_turn(found, self.pattern)
        if not len(tokens):
            raise BadExample(
                f"too short: no whole turn of tokens in {len(clip)} samples", "too short"
            )
        return tokens.astype(np.int32)


def check(settings: UnitsOfModels) -> None:
    """Raises UserError where the pattern is none of the streams."""
    pattern = settings.pattern
    if isinstance(pattern, str) or (pattern and len(pattern) != len(settings.streams)):
        raise UserError(
            f"{TOKENS}.pattern: {pattern}: give a number for each of the "
            f"{len(settings.streams)} streams, such as [2, 3]"
        )


def in_turn(streams: Sequence[np.ndarray], pattern: Sequence[int]) -> np.ndarray:
    """So many of each stream in turn, as long as all have them."""
    turns = min(len(one) // count for one, count in zip(streams, pattern, strict=True))
    parts = [
        one[: turns * count].reshape(turns, count)
        for one, count in zip(streams, pattern, strict=True)
    ]
    return np.concatenate(parts, axis=1).reshape(-1)


def _centroids(key: str, settings: TokenStream) -> np.ndarray:
    path = str(settings.centroids)
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}.centroids: {path}: no array of numpy ({error})") from None
    if found.ndim != 2 or len(found) != settings.codes:
        raise UserError(
            f"{key}.centroids: {path} has {list(found.shape)} values, not {key}.codes = "
            f"{settings.codes} rows"
        )
    return np.ascontiguousarray(found, np.float32)
