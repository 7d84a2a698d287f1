"""Speech tokenizers: a clip -> discrete units, so that a causal language model reads and speaks it.

Stands before the index (fitted once, by `fit_or_load`) and inside the causal_lm encoder (applied
in the data tasks). The interface is `SpeechTokenizer`; k-means over stacked frames is the one
implementation, and others join it in `fit_or_load` and `load`.

Costs: encoding a clip of 2 s with 100 clusters takes its features and about 0.1 ms. Fitting on 500
clips of 1 s with 100 clusters takes about 2 s and, at 80 mels and 4 frames a unit, 1.3 kB a unit.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from raysft import patience
from raysft.config.speech_tokens import SpeechTokens
from raysft.data.clips.features import Fbank, FrontEnd, LogMel, mean_normalised
from raysft.errors import UserError

FILE_NAME = "speech_tokens.safetensors"
SAMPLE_RATE = 16000
POINTS_PER_CLUSTER = 256  # more add nothing to a centroid
ROUNDS = 50  # of Lloyd's algorithm, at most


class SpeechTokenizer(ABC):
    """What turns clips into units 0 .. clusters - 1."""

    sample_rate: int
    clusters: int

    @property
    @abstractmethod
    def units_per_second(self) -> float:
        """Frame rate of the units."""

    @abstractmethod
    def units_count(self, samples: int) -> int:
        """Units of a clip of so many samples: exactly len(encode(clip))."""

    @abstractmethod
    def encode(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] at sample_rate -> int32 [units_count(samples)]."""

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 of all that decides the units."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write it to one file (safetensors), all or nothing."""


class KMeans(SpeechTokenizer):
    """Nearest of `clusters` centroids for each `stack` mean-normalised frames of 10 ms.

    Frames that do not fill the last unit are dropped. Repeats are kept: a unit is always
    `stack` x 10 ms long.
    """

    def __init__(self, centroids: np.ndarray, features: str, mels: int, stack: int) -> None:
        """centroids: float32 [clusters, stack * mels]; features: log_mel or fbank."""
        self.centroids = np.ascontiguousarray(centroids, np.float32)
        self.features, self.mels, self.stack = features, mels, stack
        self.sample_rate, self.clusters = SAMPLE_RATE, len(centroids)
        self._front_end = _front_end(features, mels)
        self._half_squares = (self.centroids**2).sum(axis=1) / 2

    @classmethod
    def fit(cls, clips: Iterable[np.ndarray], config: SpeechTokens, seed: int) -> KMeans:
        """k-means++ and Lloyd's algorithm on up to `config.fit_clips` clips (float32 [samples]).

        The same clips in the same order and the same seed give the same centroids. Raises
        UserError where the clips have fewer units than there are clusters.
        """
        front_end = _front_end(config.features, config.mels)
        rows = [_stacked(clip, front_end, config.stack) for clip in islice(clips, config.fit_clips)]
        centroids = fitted(rows, config.clusters, seed, "data.speech_tokens")
        return cls(centroids, config.features, config.mels, config.stack)

    @property
    def units_per_second(self) -> float:
        """Frame rate of the units: 100 / stack."""
        return 100 / self.stack

    def units_count(self, samples: int) -> int:
        """Whole stacks of frames in so many samples."""
        return self._front_end.frames(samples) // self.stack

    def encode(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples >= 400] at 16 kHz -> int32 [units_count(samples)]."""
        points = _stacked(clip, self._front_end, self.stack)
        return (points @ self.centroids.T - self._half_squares).argmax(axis=1).astype(np.int32)

    def fingerprint(self) -> str:
        """sha256 of the centroids and the settings of their features."""
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        digest.update(self.centroids.tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write centroids and settings to `path`, all or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        metadata = {key: str(value) for key, value in self._settings().items()}
        part.write_bytes(safetensors.numpy.save({"centroids": self.centroids}, metadata))
        os.replace(part, path)

    def _settings(self) -> dict[str, str | int]:
        return {
            "method": "kmeans",
            "features": self.features,
            "mels": self.mels,
            "stack": self.stack,
            "sample_rate": self.sample_rate,
        }


def location(config: SpeechTokens, folder: Path) -> Path:
    """Where the fitted tokenizer lies: data.speech_tokens.path, else in the run's `folder`."""
    return Path(config.path) if config.path else folder / FILE_NAME


def fit_or_load(
    config: SpeechTokens, folder: Path, clips: Iterable[np.ndarray], seed: int
) -> SpeechTokenizer:
    """The tokenizer at `location(config, folder)`; fitted on `clips` and saved there if absent.

    clips: float32 [samples] at 16 kHz, only drawn from where fitting is needed: give a generator.
    """
    path = location(config, folder)
    if path.exists():
        return load(config, folder)
    fitted = KMeans.fit(clips, config, seed)
    fitted.save(path)
    return fitted


def load(config: SpeechTokens, folder: Path) -> SpeechTokenizer:
    """The tokenizer at `location(config, folder)`. Raises UserError: none there, or another one."""
    path = location(config, folder)

    def read() -> tuple[dict[str, str], np.ndarray]:
        with safetensors.safe_open(path, framework="np") as file:
            return file.metadata() or {}, file.get_tensor("centroids")

    try:
        metadata, centroids = patience.patiently(read, path)
    except FileNotFoundError:
        raise UserError(
            f"data.speech_tokens: no fitted speech tokenizer at {path}: training fits one on the "
            "audio of data.train; or set data.speech_tokens.path to a fitted one"
        ) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"data.speech_tokens: {path} is no speech tokenizer of raysft ({error}): "
            "remove it to have it fitted anew, or set data.speech_tokens.path to another"
        ) from None
    found = {**metadata, "clusters": str(len(centroids))}
    for key in ("method", "clusters", "features", "mels", "stack"):
        wanted = str(getattr(config, key))
        if found.get(key) != wanted:
            raise UserError(
                f"data.speech_tokens.{key}: {wanted}, but {path} was fitted with "
                f"{found.get(key)}: use that value, or another data.speech_tokens.path"
            )
    if centroids.shape[1:] != (config.stack * config.mels,):
        raise UserError(f"data.speech_tokens: {path} is damaged: its centroids do not fit its mels")
    return KMeans(centroids, config.features, config.mels, config.stack)


def fitted(rows: list[np.ndarray], clusters: int, seed: int, key: str) -> np.ndarray:
    """float32 [clusters, values]: centroids of the points of all clips, rows: float32 [points,
    values] of each, or of a sample of them.

    key: of the settings, for a UserError where there are fewer different points than clusters.
    """
    points = np.concatenate(rows) if rows else np.zeros((0, 1), np.float32)
    rng = np.random.default_rng(seed)
    most = POINTS_PER_CLUSTER * clusters
    if len(points) > most:
        points = points[np.sort(rng.choice(len(points), most, replace=False))]
    distinct = len(np.unique(points, axis=0))
    if distinct < clusters:
        raise UserError(
            f"{key}.clusters: {clusters} clusters, but the {len(rows)} clips fitted on have only "
            f"{distinct} different units: give more clips ({key}.fit_clips) or fewer clusters"
        )
    return lloyd(points, spread(points, clusters, rng))


def _front_end(features: str, mels: int) -> FrontEnd:
    return (LogMel if features == "log_mel" else Fbank)(SAMPLE_RATE, mels)


def _stacked(clip: np.ndarray, front_end: FrontEnd, stack: int) -> np.ndarray:
    """float32 [samples] -> float32 [units, stack * mels]."""
    frames = mean_normalised(front_end(clip)[: front_end.frames(len(clip))])
    units = len(frames) // stack
    return frames[: units * stack].reshape(units, stack * front_end.mels)


def spread(points: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): centroids far from those before them.

    Of a few points drawn by their squared distance to the nearest centroid, the one is taken that
    leaves the smallest sum of these distances.
    """
    squares = (points**2).sum(axis=1)

    def distances(rows: np.ndarray) -> np.ndarray:
        """[rows, points], squared; exactly 0 to itself, so that none is drawn twice."""
        table = squares[rows, None] - 2 * (points[rows] @ points.T) + squares
        table[np.arange(len(rows)), rows] = 0
        return np.maximum(table, 0)

    chosen = [int(rng.integers(len(points)))]
    nearest = distances(np.array(chosen))[0]
    for _ in range(clusters - 1):
        cumulated = nearest.cumsum(dtype=np.float64)
        draws = rng.random(2 + int(np.log(clusters))) * cumulated[-1]
        drawn = np.searchsorted(cumulated, draws, side="right").clip(max=len(points) - 1)
        tables = np.minimum(nearest, distances(drawn))
        best = int(tables.sum(axis=1, dtype=np.float64).argmin())
        chosen.append(int(drawn[best]))
        nearest = tables[best]
    return points[chosen]


def lloyd(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Move centroids to the means of their points until no point changes its centroid."""
    assigned = np.full(len(points), -1)
    squares = (points**2).sum(axis=1)
    for _ in range(ROUNDS):
        half_squares = (centroids**2).sum(axis=1) / 2
        nearest = np.empty(len(points), np.int64)
        closeness = np.empty(len(points), np.float32)
        for start in range(0, len(points), 8192):  # bounds the table of distances
            block = slice(start, start + 8192)
            scores = points[block] @ centroids.T - half_squares
            nearest[block] = scores.argmax(axis=1)
            closeness[block] = scores.max(axis=1)
        counts = np.bincount(nearest, minlength=len(centroids))
        # A centroid without points takes over one of the points farthest from their own.
        far = iter(np.argsort(2 * closeness - squares, kind="stable"))
        for empty in np.flatnonzero(counts == 0):
            point = next(p for p in far if counts[nearest[p]] > 1)
            counts[nearest[point]] -= 1
            nearest[point], counts[empty] = empty, 1
        if np.array_equal(nearest, assigned):
            break
        assigned = nearest
        order = np.argsort(assigned, kind="stable")
        starts = np.concatenate([[0], counts.cumsum()[:-1]])
        centroids = np.add.reduceat(points[order], starts, axis=0) / counts[:, None]
        centroids = centroids.astype(np.float32)
    return centroids
