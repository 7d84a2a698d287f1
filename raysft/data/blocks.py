"""The index cut into blocks, the order of blocks in a cycle, and the windows cut from that order.

sources -> index -> plan (here: what is shuffled and read together) -> stream -> step -> ...
A block is a run of up to 64 consecutive examples of one source (more for a very large index): the
unit of sequential reading. A cycle is a group's pass over its blocks in an order drawn from (seed,
group, cycle); a window is a run of blocks of that order. For every block this keeps where it
starts and, by group, how many examples and positions it holds; nothing is kept by example.

Cost: one reading of the columns (about 100 million examples a second), then 12 + 16 bytes a group
for each of at most a million blocks. A cycle sorts its blocks: 0.1 s for a million of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raysft.errors import UserError

BLOCK = 64  # examples
MAX_BLOCKS = 1 << 20
MAX_VISITS = 1 << 24  # of blocks in a cycle: its order takes 8 bytes each, and 32 while it is made
_CHUNK = 1 << 20  # examples of a column in memory while it is read


def permutation(n: int, *key: int | str) -> np.ndarray:
    """A random order of n things, int64 [n], that depends on `key` alone.

    Sorts the bytes of a hash: numpy's own shuffles may change between its versions, and a plan
    must be the same wherever and whenever it is made. Costs 0.15 s for a million things.
    """
    bits = np.frombuffer(hashlib.shake_256(repr(key).encode()).digest(8 * n), "<u8")
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


@dataclass(frozen=True, slots=True)
class Cycle:
    """One pass over a group. Window j holds `order[bounds[j]:bounds[j + 1]]`.

    order: int64, numbers of blocks. bounds: int64 [windows + 1].
    totals: int64 [windows + 1], positions in the windows before the j-th.
    """

    order: np.ndarray
    bounds: np.ndarray
    totals: np.ndarray

    @property
    def windows(self) -> int:
        return len(self.bounds) - 1


class Blocks:
    """Blocks, cycles and windows of the examples that fit `budget`.

    examples: int64 [groups], examples of each group that fit. oversize: int64, rows of the index
    that do not. present: int64 [tasks], examples of each task, fitting or not. shortest: positions.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        task: np.ndarray,
        group_of_task: Sequence[int],
        source: np.ndarray,
        weights: Sequence[float],
        *,
        budget: int,
        window: int,
        seed: int,
        shuffled: bool,
    ) -> None:
        """tokens, task, source: int [N], may be memory-mapped; task and source are numbers into
        `group_of_task` and `weights`. budget: positions; window: examples."""
        # Plain views: indexing an np.memmap object itself is several times slower.
        self.tokens = np.asarray(tokens)
        self._task = np.asarray(task)
        self._group_of_task = np.asarray(group_of_task, np.int64)
        self._groups = int(self._group_of_task.max()) + 1
        self._weights = weights
        self._budget, self._window = budget, window
        self._seed, self._shuffled = seed, shuffled
        source = np.asarray(source)
        self._starts = _cut(source, window)
        self._source = source[self._starts[:-1]]
        self._refuse_weights(source)
        self._scan()

    def _refuse_weights(self, source: np.ndarray) -> None:
        """Weights that are counts or hours would have every pass of an epoch written out."""
        weights = np.asarray(self._weights, np.float64)
        visits = float(weights[self._source].sum())
        if visits <= MAX_VISITS:
            return
        examples = np.bincount(source, minlength=len(weights))
        used = examples > 0
        heaviest = int(np.argmax(np.where(used, weights, 0)))
        shares = weights[used] / examples[used]
        meant = ", ".join(f"{share:.3g}" for share in shares / shares.max())
        raise UserError(
            f"data.train.{heaviest}.weight: {weights[heaviest]:g}: each of its "
            f"{examples[heaviest]:,} examples would be seen {weights[heaviest]:,.0f} times an "
            f"epoch, {float((weights * examples).sum()):,.0f} examples with the other sources. A "
            "weight is how often a source is seen in an epoch, no number of clips or hours. Leave "
            "weights out to see every example once; as shares of what is seen yours would be "
            f"weight {meant}"
        )

    def _scan(self) -> None:
        """One pass over the columns, a few blocks at a time."""
        blocks, groups = len(self._starts) - 1, self._groups
        self._counts = np.zeros((groups, blocks), np.int64)
        self._sums = np.zeros((groups, blocks), np.int64)
        self.present = np.zeros(len(self._group_of_task), np.int64)
        self.shortest = np.iinfo(np.int64).max
        oversize = []
        stride = max(1, _CHUNK // int(np.diff(self._starts).max()))
        for first in range(0, blocks, stride):
            starts = self._starts[first : first + stride + 1]
            tokens = self.tokens[starts[0] : starts[-1]]
            task = self._task[starts[0] : starts[-1]]
            shortest = int(tokens.min())
            if shortest < 1:
                row = int(starts[0]) + int(np.argmin(tokens))
                raise ValueError(f"row {row} of the index takes {shortest} positions")
            self.shortest = min(self.shortest, shortest)
            self.present += np.bincount(task, minlength=len(self.present))
            fits = tokens <= self._budget
            oversize.append(np.flatnonzero(~fits) + starts[0])
            there = slice(first, first + len(starts) - 1)
            at = starts[:-1] - starts[0]
            for group in range(groups):
                mine = fits & (self._group_of_task[task] == group) if groups > 1 else fits
                self._counts[group, there] = np.add.reduceat(mine, at, dtype=np.int64)
                self._sums[group, there] = np.add.reduceat(
                    np.where(mine, tokens, 0), at, dtype=np.int64
                )
        self.oversize = np.concatenate(oversize).astype(np.int64)
        self.examples = self._counts.sum(axis=1)

    def cycle(self, group: int, number: int) -> Cycle:
        """The `number`-th pass over `group`. It is empty (no windows) where a group is so small
        and its sources' weights so low that it is not its turn."""
        order = self._order(group, number)
        counts = np.cumsum(self._counts[group][order])
        total = int(counts[-1]) if len(counts) else 0
        windows = max(1, round(total / self._window))
        edges = np.arange(1, windows, dtype=np.int64) * total // windows
        bounds = np.unique(
            np.concatenate([[0], np.searchsorted(counts, edges) + 1, [len(order)]])
        ).astype(np.int64)
        sums = np.concatenate([[0], np.cumsum(self._sums[group][order])])
        return Cycle(order, bounds, sums[bounds])

    def rows(self, group: int, cycle: Cycle, window: int) -> np.ndarray:
        """Rows of the index in a window, int64, block by block in the cycle's order."""
        blocks = cycle.order[cycle.bounds[window] : cycle.bounds[window + 1]]
        starts = self._starts[blocks]
        sizes = self._starts[blocks + 1] - starts
        before = np.cumsum(sizes) - sizes
        rows = np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))
        fits = self.tokens[rows] <= self._budget
        if self._groups > 1:
            fits &= self._group_of_task[self._task[rows]] == group
        return rows[fits]

    def _order(self, group: int, number: int) -> np.ndarray:
        """The blocks of a cycle in its order, each as often as its source's weight says.

        A weight of 2.3 gives every block twice and three tenths of them once more. Those tenths
        walk through a fixed random order of the source's blocks, so that over the cycles every
        block gets its share: two cycles at 0.5 are one pass.
        """
        blocks = np.flatnonzero(self._counts[group])
        source = self._source[blocks]
        weights = np.asarray(self._weights)[source]
        passes = [blocks[weights >= copy] for copy in range(1, math.floor(weights.max()) + 1)]
        extra = []
        for number_of_source in np.unique(source).tolist():
            share = self._weights[number_of_source] % 1
            if share:
                mine = blocks[source == number_of_source]
                turn = permutation(len(mine), self._seed, "weight", group, number_of_source)
                first, last = (
                    math.ceil(round((number + end) * share * len(mine), 6)) for end in (0, 1)
                )
                extra.append(mine[turn[np.arange(first, last) % len(mine)]])
        if extra:
            passes.append(np.sort(np.concatenate(extra)))
        order = np.concatenate(passes)
        if self._shuffled:
            order = order[permutation(len(order), self._seed, "blocks", group, number)]
        return order


def _cut(source: np.ndarray, window: int) -> np.ndarray:
    """Where blocks start, int64 [blocks + 1]; no block spans two sources.

    Small sources and small windows have smaller blocks, so that they too are shuffled well.
    """
    n = len(source)
    changes = [
        np.flatnonzero(np.diff(source[at : at + _CHUNK + 1])) + at + 1 for at in range(0, n, _CHUNK)
    ]
    edges = np.concatenate([[0], *changes, [n]]).astype(np.int64)
    if len(edges) > MAX_BLOCKS:
        raise UserError(
            f"the index changes its source {len(edges) - 1} times: sources must follow one another"
        )
    least = -(-n // MAX_BLOCKS)
    most = min(BLOCK, max(1, window // 8))
    pieces = [
        np.arange(start, stop, max(least, min(most, max(1, (stop - start) // 256))))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    return np.concatenate([*pieces, [n]]).astype(np.int64)
