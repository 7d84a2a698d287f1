"""Which row of an index is the n-th example of a source and kind, whatever lies between them.

Under windows.py: from places in a random order to rows. Nothing is kept by example, but how many
there are in the blocks before each (8 bytes a block and kind); the place within a block is read off
the columns where it holds examples of other kinds, or such as do not fit.
"""

from __future__ import annotations

import numpy as np

from raysft.data.plan.blocks import Blocks


class Members:
    """Examples that fit, of each kind and source, by their number."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        source = blocks.source
        self._order = np.argsort(source, kind="stable").astype(np.int32)
        numbers = np.arange(int(source.max()) + 2)
        self._first = np.searchsorted(source[self._order], numbers)
        self._before: dict[int, np.ndarray] = {}

    def count(self, kind: int, source: int) -> int:
        """How many there are."""
        before = self._sums(kind)
        if source + 1 >= len(self._first):
            return 0
        return int(before[self._first[source + 1]] - before[self._first[source]])

    def rows(self, kind: int, source: int, numbers: np.ndarray) -> np.ndarray:
        """Rows of the index, int64: of the examples with these numbers, from 0 on."""
        before, blocks = self._sums(kind), self._blocks
        numbers = numbers + before[self._first[source]]
        at = np.searchsorted(before, numbers, side="right") - 1
        block = self._order[at].astype(np.int64)
        inside = numbers - before[at]
        rows = blocks.starts[block] + inside
        sizes = blocks.starts[block + 1] - blocks.starts[block]
        some = np.flatnonzero(blocks.counts[kind][block] != sizes)
        if len(some):
            rows[some] = self._among(kind, block[some], inside[some])
        return rows

    def _among(self, kind: int, block: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Rows of the `inside`-th example of its kind in each block, which has others too."""
        starts = self._blocks.starts[block]
        sizes = self._blocks.starts[block + 1] - starts
        begin = np.cumsum(sizes) - sizes
        every = np.repeat(starts - begin, sizes) + np.arange(int(sizes.sum()))
        seen = np.cumsum(self._blocks.fits(every, kind))
        earlier = np.where(begin > 0, seen[begin - 1], 0)
        return every[np.searchsorted(seen, earlier + inside + 1)]

    def _sums(self, kind: int) -> np.ndarray:
        """int64 [blocks + 1]: examples of a kind in the blocks before each, source by source."""
        if kind not in self._before:
            counts = self._blocks.counts[kind][self._order]
            self._before[kind] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return self._before[kind]
