"""Which examples go into which shard: the rows of an index, in their order, so many a shard.

Pure: the same index and settings give the same shards, so that a preparation that was killed goes
on with those that are not there yet.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from raysft.config.prepare import Prepare
from raysft.data.clips.audio import Limits
from raysft.data.example import Example
from raysft.data.index.build import Index
from raysft.prepare.shard import spoken

BYTES_A_SECOND = 32_000  # of 16-bit samples at 16 kHz


class Lengths:
    """Measures clips and nothing else: for an index of what is not trained on."""

    sample_rate: int | None = 16_000
    fingerprint = "lengths"

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def measure(self, example: Example, samples: Iterable[int]) -> int:
        """1. Raises BadExample where it is no clip with a text."""
        spoken(example)
        return 1

    def workload(self, example: Example, samples: Iterable[int]) -> float:
        """Nothing is computed of it."""
        return 0.0

    def of_training(self) -> Lengths:
        """Itself."""
        return self


def cuts(index: Index, settings: Prepare) -> list[tuple[int, int]]:
    """First row of each shard, and last + 1."""
    if settings.mib is None:
        ends = [*range(settings.rows, len(index), settings.rows), len(index)]
    else:
        ends = _by_size(np.asarray(index.seconds), settings.rows, settings.mib * (1 << 20))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _by_size(seconds: np.ndarray, rows: int, most: float) -> list[int]:
    """Where shards end that hold `rows` rows and `most` bytes at the most, and a row at least."""
    sizes = np.cumsum(seconds, dtype=np.float64) * BYTES_A_SECOND
    ends, start, before = [], 0, 0.0
    while start < len(sizes):
        stop = int(np.searchsorted(sizes, before + most, side="right"))
        stop = min(max(stop, start + 1), start + rows, len(sizes))
        ends.append(stop)
        start, before = stop, float(sizes[stop - 1])
    return ends
