"""Planning of algorithm 2: runs that began with it go on with it, to the same batches.

plan -> windows -> plan_v2 (here, where plan.json says so). A window is a random sample of its pool,
and a pool one of the cycle: a run of blocks of the cycle, up to a million examples, which lie there
in random order, each for itself. With up to a million examples an epoch is one pool, its order a
true permutation; with more, neighbours of a block meet in a step more often than by chance. Nothing
here may change: these are the batches of runs.
"""

from __future__ import annotations

import numpy as np

from raysft.config.schema import Data
from raysft.data.plan import pack
from raysft.data.plan.blocks import Blocks, noise, permutation
from raysft.data.plan.windows import FILL, Cycle

ALGORITHM = 2
POOL = 1 << 20  # examples


class Shuffled:
    """Order shuffled, as it was."""

    def __init__(self, blocks: Blocks, data: Data, seed: int) -> None:
        self.blocks, self._data, self._seed = blocks, data, seed
        self.examples = blocks.examples

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
