"""Planning of algorithm 1: runs that began with it go on with it, to the same batches.

plan -> windows -> plan_v1 (here, where plan.json says so). What it does otherwise: blocks of up to
64 neighbours stay together in a window, in every epoch; long examples are dealt evenly only where
that takes no row more than fits; nothing is drawn where lengths are sorted. Everything else is
shared with the version of today. Nothing here may change: these are the batches of runs.
"""

from __future__ import annotations

import numpy as np

from raysft.config.schema import Data
from raysft.data.plan import pack
from raysft.data.plan.blocks import Blocks, permutation
from raysft.data.plan.windows import FILL, BlockRuns, Cycle

ALGORITHM = 1


class Shuffled:
    """Order shuffled, as it was."""

    def __init__(self, blocks: Blocks, data: Data, seed: int) -> None:
        """blocks: cut `together`."""
        self.blocks, self._data, self._seed = blocks, data, seed
        self.examples = blocks.examples
        self._positions = [blocks.positions(group) for group in range(len(blocks.examples))]

    def cycle(self, group: int, number: int) -> Cycle:
        return _Cycle(self.blocks, group, number, self._data, self._seed, self._positions[group])


class _Cycle(BlockRuns):
    """totals: int64 [windows + 1], positions in the windows before the j-th."""

    def __init__(
        self,
        blocks: Blocks,
        group: int,
        number: int,
        data: Data,
        seed: int,
        positions: np.ndarray,
    ) -> None:
        super().__init__(blocks, group, number, data.window)
        self._data, self._key, self._seed = data, (group, number), seed
        sums = np.cumsum(positions[self.order])
        self.totals = np.concatenate([[0], sums])[self.bounds]

    def micro_batches(self, window: int) -> list[np.ndarray]:
        tokens, budget = self._blocks.tokens, self._blocks.budget
        rows, moved = self._shuffled(window)
        if self._data.mode == "padded":
            parts = pack.padded(tokens[rows], budget)
        else:
            rows = rows[~moved]
            if window > 0:
                before, moved = self._shuffled(window - 1)
                rows = np.concatenate([before[moved], rows])
            parts = packed(tokens[rows], budget)
        order = permutation(len(parts), self._seed, "micro-batches", *self._key, window)
        return [rows[parts[i]] for i in order]

    def _shuffled(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """A window's own rows, shuffled, and which of them move on to the next window (bool)."""
        rows = self.rows(window)
        rows = rows[permutation(len(rows), self._seed, "window", *self._key, window)]
        if self._data.mode == "padded" or window == self.windows - 1:
            return rows, np.zeros(len(rows), bool)
        excess = int(self.totals[window + 1]) % max(1, int(self._blocks.budget * FILL))
        return rows, pack.choose(self._blocks.tokens[rows], excess)


def packed(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Rows of at most `budget` positions, long examples dealt evenly to the fewest that could hold
    all, unless best fit alone needs fewer. lengths: int [n]."""
    if len(lengths) == 0:
        return []
    order = pack.falling(lengths.astype(np.int64))
    falling = lengths[order].tolist()
    fewest = -(-sum(falling) // budget)
    row_of = pack.fill(falling, budget, fewest, pack.EVEN)
    if max(row_of) >= fewest:
        row_of = min(row_of, pack.fill(falling, budget, 0, 0), key=max)
    return pack.rows(order, row_of)
