"""Windows: what is planned together, and the micro-batches it becomes.

sources -> index -> plan (here: from a cycle's blocks to micro-batches) -> stream -> step -> ...

`InOrder`    order sequential: runs of neighbouring blocks, filled as they come.
`Shuffled`   a window is the next stretch of the cycle's random order, in which each example lies
             for itself, whatever lies beside it in the files (scatter.py). What a cycle holds is a
             sum over its segments, so that neither it nor its order is written down anywhere: a
             weight of 1,000 costs no more than one of 1.

Cost: 0.3 us an example, and where its block holds other tasks too a reading of that block; of a
window what filling costs (pack.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from raysft.config.schema import Data
from raysft.data.plan import pack
from raysft.data.plan.blocks import Blocks, noise, permutation
from raysft.data.plan.members import Members
from raysft.data.plan.scatter import scattered

STRETCH = 1 << 18  # examples looked up at once
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

    blocks: what the index was cut into. examples: int64 [groups] that fit, each counted once.
    """

    blocks: Blocks
    examples: np.ndarray

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
        self.examples = blocks.examples

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


class Segment(NamedTuple):
    """Examples of a group that share a weight: those of a source, of a kind (`Blocks`)."""

    kind: int
    source: int
    weight: float


class Shuffled:
    """Order shuffled."""

    def __init__(
        self, blocks: Blocks, data: Data, seed: int, groups: Sequence[Sequence[Segment]]
    ) -> None:
        """groups: of each its segments; no example is in two of them."""
        self.blocks, self._data, self._seed = blocks, data, seed
        self._members = Members(blocks)
        # Those that are empty take no part: a source all of whose examples are of another task.
        self._groups = [[one for one in group if self._count(one)] for group in groups]
        counts = [sum(map(self._count, group)) for group in self._groups]
        self.examples = np.array(counts, np.int64)

    def _count(self, segment: Segment) -> int:
        return self._members.count(segment.kind, segment.source)

    def cycle(self, group: int, number: int) -> Cycle:
        pieces = [self._piece(group, segment, number) for segment in self._groups[group]]
        return _ShuffledCycle(
            self._members, pieces, (self._data, self._seed), (group, number), self.blocks
        )

    def _piece(self, group: int, segment: Segment, number: int) -> _Piece:
        """What of a segment cycle `number` holds.

        A weight of 2.3 gives every example twice and three tenths of them once more. Those tenths
        walk through a fixed random order of the segment, so that over the cycles every example gets
        its share: two cycles at 0.5 are one pass.
        """
        count = self._count(segment)
        share = segment.weight % 1
        first, last = (math.ceil(round((number + end) * share * count, 6)) for end in (0, 1))
        key = (self._seed, "weight", group, segment.kind, segment.source)
        return _Piece(segment, count, math.floor(segment.weight), first, last - first, key)


class _Piece(NamedTuple):
    """A segment's part in a cycle: all `of` its examples `passes` times, and `more` of them from
    the `first` on in its own fixed order."""

    segment: Segment
    of: int
    passes: int
    first: int
    more: int
    key: tuple[int | str, ...]

    @property
    def examples(self) -> int:
        """Of the cycle."""
        return self.passes * self.of + self.more

    def ranks(self, places: np.ndarray) -> np.ndarray:
        """Of places in it, int64 from 0 on: which of the segment's examples lie there."""
        found = places % self.of
        extra = places >= self.passes * self.of
        if extra.any():
            turn = places[extra] - self.passes * self.of + self.first
            found[extra] = scattered(self.of, *self.key)(turn % self.of)
        return found


class _Stretch:
    """Some windows of a cycle, one after the other.

    rows: int64 [examples]. bounds: int64 [windows + 1], where each begins. totals: int64
    [windows + 1], positions in the windows before the j-th.
    """

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, bounds: np.ndarray) -> None:
        self.rows, self.bounds = rows, bounds
        totals = np.cumsum(lengths, dtype=np.int64)
        self.totals = np.concatenate([[0], totals])[bounds]


class _ShuffledCycle:
    """Window j holds places `_bound(j)` to `_bound(j + 1)` of the cycle's order; looked up are
    `per` windows at once."""

    def __init__(
        self,
        members: Members,
        pieces: Sequence[_Piece],
        settings: tuple[Data, int],
        key: tuple[int, int],
        blocks: Blocks,
    ) -> None:
        self._members, self._pieces, self._blocks = members, pieces, blocks
        (self._data, self._seed), self._key = settings, key
        self._ends = np.cumsum([piece.examples for piece in pieces], dtype=np.int64)
        self._total = int(self._ends[-1]) if len(pieces) else 0
        self.windows = max(1, round(self._total / self._data.window)) if self._total else 0
        self._per = max(1, STRETCH // self._data.window)
        self._order = scattered(self._total, self._seed, "order", *key) if self._total else None
        self._stretches: dict[int, _Stretch] = {}  # the one in use

    def micro_batches(self, window: int) -> list[np.ndarray]:
        tokens, budget = self._blocks.tokens, self._blocks.budget
        number, at = divmod(window, self._per)
        stretch = self._stretch(number)
        rows, moved = self._own(stretch, at)
        fill = pack.padded
        if self._data.mode == "packed":
            fill, rows = pack.packed, rows[~moved]
            if at > 0:
                before, moved = self._own(stretch, at - 1)
                rows = np.concatenate([before[moved], rows])
        key = (self._seed, "lengths", *self._key, window)
        parts = fill(tokens[rows], budget, noise(len(rows), *key))
        order = permutation(len(parts), self._seed, "micro-batches", *self._key, window)
        return [rows[parts[i]] for i in order]

    def _own(self, stretch: _Stretch, at: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a stretch's window, and which of them move on to the next window (bool).

        In mode packed as many move on as would only begin a row: what is left over from filling
        all positions up to here into full rows. This depends on no other window's packing, and
        spares each window (but the stretch's last) its half-empty row.
        """
        rows = stretch.rows[stretch.bounds[at] : stretch.bounds[at + 1]]
        if self._data.mode == "padded" or at == len(stretch.bounds) - 2:
            return rows, np.zeros(len(rows), bool)
        excess = int(stretch.totals[at + 1]) % max(1, int(self._blocks.budget * FILL))
        return rows, pack.choose(self._blocks.tokens[rows], excess)

    def _stretch(self, number: int) -> _Stretch:
        if number not in self._stretches:
            first = number * self._per
            windows = range(first, min(self.windows, first + self._per) + 1)
            bounds = np.array([at * self._total // self.windows for at in windows], np.int64)
            rows = self._rows(int(bounds[0]), int(bounds[-1]))
            found = _Stretch(rows, self._blocks.tokens[rows], bounds - bounds[0])
            self._stretches = {number: found}
        return self._stretches[number]

    def _rows(self, first: int, last: int) -> np.ndarray:
        """Rows of the index at these places of the cycle's order, int64."""
        assert self._order is not None
        places = self._order(np.arange(first, last, dtype=np.int64))
        number = np.searchsorted(self._ends, places, side="right")
        rows = np.zeros(len(places), np.int64)
        for at in np.unique(number).tolist():
            piece, mine = self._pieces[at], number == at
            ranks = piece.ranks(places[mine] - int(self._ends[at]) + piece.examples)
            rows[mine] = self._members.rows(piece.segment.kind, piece.segment.source, ranks)
        return rows
