"""Windows: what is planned together, and the micro-batches it becomes.

sources -> index -> plan (here: from a cycle's blocks to micro-batches) -> stream -> step -> ...

`InOrder`    order sequential: runs of neighbouring blocks, filled as they come.
`Shuffled`   a window is a random sample of its pool, and a pool one of the cycle. A pool is a run
             of blocks of the cycle, up to a million examples, which lie there in random order,
             each for itself. With up to a million examples an epoch is one pool, its order a true
             permutation; with more, the variance of a step of n examples is at most that under a
             true permutation times 1 + n x (examples of a block) / 2^20.

Cost: of a pool 0.3 s and 30 MB, once; of a window what filling costs (pack.py).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from raysft.config.schema import Data
from raysft.data.plan import pack
from raysft.data.plan.blocks import Blocks, noise, permutation

POOL = 1 << 20  # examples
# Windows aim to fill packed rows to this share: the rest lets the last examples find a place.
FILL = 0.998


class Cycle(Protocol):
    """One pass over a group."""

    @property
    def windows(self) -> int:
        """How many it has; none where it is not the group's turn."""

    def micro_batches(self, window: int) -> list[np.ndarray]:
        """A window's micro-batches in order: rows of the index, int64 each. Without any where the
        window's examples all moved on to the next."""


class Windows(Protocol):
    """Cycles of the groups of an index.

    blocks: what the index was cut into.
    """

    blocks: Blocks

    def cycle(self, group: int, number: int) -> Cycle:
        """The `number`-th pass over `group`."""


class BlockRuns:
    """A cycle whose windows are runs of whole blocks, `order[bounds[j]:bounds[j + 1]]`.

    order: int64, numbers of blocks. bounds: int64 [windows + 1].
    """

    def __init__(self, blocks: Blocks, group: int, number: int, size: int) -> None:
        """size: examples of a window, about."""
        self._blocks, self._group = blocks, group
        self.order = blocks.order(group, number)
        counts = np.cumsum(blocks.counts[group][self.order], dtype=np.int64)
        total = int(counts[-1]) if len(counts) else 0
        windows = max(1, round(total / size))
        edges = np.arange(1, windows, dtype=np.int64) * total // windows
        self.bounds = np.unique(
            np.concatenate([[0], np.searchsorted(counts, edges) + 1, [len(self.order)]])
        ).astype(np.int64)

    @property
    def windows(self) -> int:
        return len(self.bounds) - 1

    def rows(self, window: int) -> np.ndarray:
        """Rows of the index in a window, int64, block by block in the cycle's order."""
        return self._blocks.rows(
            self._group, self.order[self.bounds[window] : self.bounds[window + 1]]
        )


class InOrder:
    """Order sequential."""

    def __init__(self, blocks: Blocks, data: Data) -> None:
        self.blocks, self._data = blocks, data

    def cycle(self, group: int, number: int) -> Cycle:
        return _InOrderCycle(self.blocks, group, number, self._data)


class _InOrderCycle(BlockRuns):
    def __init__(self, blocks: Blocks, group: int, number: int, data: Data) -> None:
        super().__init__(blocks, group, number, data.window)
        self._data = data

    def micro_batches(self, window: int) -> list[np.ndarray]:
        rows, data = self.rows(window), self._data
        lengths = self._blocks.tokens[rows]
        parts = pack.in_order(lengths, self._blocks.budget, data.mode == "padded")
        return [rows[part] for part in parts]


class Shuffled:
    """Order shuffled."""

    def __init__(self, blocks: Blocks, data: Data, seed: int) -> None:
        self.blocks, self._data, self._seed = blocks, data, seed

    def cycle(self, group: int, number: int) -> Cycle:
        return _ShuffledCycle(self.blocks, group, number, self._data, self._seed)


class _Pool:
    """Examples of a pool in their order, and where its windows begin.

    rows: int64 [examples]. bounds: int64 [windows + 1]. totals: int64 [windows + 1], positions in
    the windows of the pool before the j-th.
    """

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, windows: int) -> None:
        self.rows = rows
        self.bounds = np.arange(windows + 1, dtype=np.int64) * len(rows) // windows
        totals = np.cumsum(lengths, dtype=np.int64)
        self.totals = np.concatenate([[0], totals])[self.bounds]


class _ShuffledCycle:
    """Pool p holds the windows from `firsts[p]` on, and blocks `order[bounds[p]:bounds[p + 1]]`."""

    def __init__(self, blocks: Blocks, group: int, number: int, data: Data, seed: int) -> None:
        self._blocks, self._data, self._seed = blocks, data, seed
        self._key = (group, number)
        self._order = blocks.order(group, number)
        counts = np.cumsum(blocks.counts[group][self._order], dtype=np.int64)
        total = int(counts[-1]) if len(counts) else 0
        self.windows = max(1, round(total / data.window)) if total else 0
        pools = min(self.windows, -(-self.windows * data.window // POOL))
        self._firsts = np.arange(pools + 1, dtype=np.int64) * self.windows // max(1, pools)
        edges = self._firsts[1:-1] * total // max(1, self.windows)
        inner = np.searchsorted(counts, edges) + 1
        self._bounds = np.concatenate([[0], inner, [len(self._order)]]).astype(np.int64)
        self._pools: dict[int, _Pool] = {}  # the one in use

    def micro_batches(self, window: int) -> list[np.ndarray]:
        number = int(np.searchsorted(self._firsts, window, side="right")) - 1
        pool, at = self._pool(number), window - int(self._firsts[number])
        tokens, budget = self._blocks.tokens, self._blocks.budget
        rows, moved = self._own(pool, at)
        fill = pack.padded
        if self._data.mode == "packed":
            fill, rows = pack.packed, rows[~moved]
            if at > 0:
                before, moved = self._own(pool, at - 1)
                rows = np.concatenate([before[moved], rows])
        key = (self._seed, "lengths", *self._key, window)
        parts = fill(tokens[rows], budget, noise(len(rows), *key))
        order = permutation(len(parts), self._seed, "micro-batches", *self._key, window)
        return [rows[parts[i]] for i in order]

    def _own(self, pool: _Pool, at: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a pool's window, and which of them move on to the next window (bool).

        In mode packed as many move on as would only begin a row: what is left over from filling
        all positions up to here into full rows. This depends on no other window's packing, and
        spares each window (but the pool's last) its half-empty row.
        """
        rows = pool.rows[pool.bounds[at] : pool.bounds[at + 1]]
        if self._data.mode == "padded" or at == len(pool.bounds) - 2:
            return rows, np.zeros(len(rows), bool)
        excess = int(pool.totals[at + 1]) % max(1, int(self._blocks.budget * FILL))
        return rows, pack.choose(self._blocks.tokens[rows], excess)

    def _pool(self, number: int) -> _Pool:
        if number not in self._pools:
            group, _ = self._key
            blocks = self._order[self._bounds[number] : self._bounds[number + 1]]
            rows = self._blocks.rows(group, blocks)
            if len(rows) > len(blocks):  # else single examples, in random order already
                rows = rows[permutation(len(rows), self._seed, "pool", *self._key, number)]
            windows = int(self._firsts[number + 1] - self._firsts[number])
            self._pools = {number: _Pool(rows, self._blocks.tokens[rows], windows)}
        return self._pools[number]
