"""The index cut into blocks, and the order of blocks in a cycle: what every shuffle begins with.

sources -> index -> plan (here: what is drawn together) -> stream -> step -> ...
A block is a run of consecutive examples of one source, the unit of which tables are kept: a single
example where an epoch has up to a million of them, more above that (`single`); or, where blocks
shall keep neighbours together, up to 64 (`together`: order sequential, and runs of algorithm 1). A
cycle is a group's pass over its blocks in an order drawn from (seed, group, cycle). For every block
this keeps where it starts and, by group, how many examples it holds; nothing is kept by example.

Cost: one reading of the columns (about 100 million examples a second), then 10 + 4 bytes a group
for each of at most a million blocks. A cycle sorts its blocks: 0.15 s for a million of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from raysft.data.plan.kinds import Paired
from raysft.errors import UserError

TOGETHER = 64  # examples
COUNTED = 64  # examples
MAX_BLOCKS = 1 << 20
MAX_VISITS = 1 << 24  # of blocks in a cycle: its order takes 8 bytes each, and 32 while it is made
MAX_SEEN = 1 << 30  # examples of an epoch; more only where that is `MAX_PASSES` or less
MAX_PASSES = 16
MAX_LONGER = 1000  # times that an epoch may have the examples there are
_CHUNK = 1 << 20  # examples of a column in memory while it is read


def permutation(n: int, *key: int | str) -> np.ndarray:
    """A random order of n things, int64 [n], that depends on `key` alone.

    Sorts the bytes of a hash: numpy's own shuffles may change between its versions, and a plan
    must be the same wherever and whenever it is made. Costs 0.15 s for a million things.
    """
    bits = np.frombuffer(hashlib.shake_256(repr(key).encode()).digest(8 * n), "<u8")
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


def noise(n: int, *key: int | str) -> np.ndarray:
    """n random numbers from 0 to 65,535, int64 [n], that depend on `key` alone."""
    return np.frombuffer(hashlib.shake_256(repr(key).encode()).digest(2 * n), "<u2").astype(
        np.int64
    )


class Sizes:
    """What examples take of two budgets, as one column: made where it is read, [rows] of int64.

    An example of t positions and s seconds of audio takes max(t, s x budget / audio) positions:
    what holds at most `budget` of them holds no more of either. All is counted in `FINE`-ths, so
    that rounding down lets no more than 0.02 positions an example through.
    """

    FINE = 64

    def __init__(self, tokens: np.ndarray, heard: np.ndarray, budget: int, audio: float) -> None:
        """tokens: int [N]. heard: float [N], seconds. budget: positions; audio: seconds."""
        self._tokens, self._heard = np.asarray(tokens), np.asarray(heard)
        self._rate = self.FINE * budget / audio
        self.budget = self.FINE * budget

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        audio = self._heard[rows].astype(np.float64) * self._rate
        tokens = self._tokens[rows].astype(np.int64) * self.FINE
        return np.maximum(tokens, (audio + 1e-3).astype(np.int64))


class Blocks:
    """Blocks of the examples that fit `budget`, and their orders.

    tokens: int [N], what each example takes of the budget: positions, or `Sizes`. budget: of a
    micro-batch, counted alike. starts: int64 [blocks + 1], rows of the index.
    counts: int32 [groups, blocks], examples that fit. examples: int64 [groups], the same in all.
    oversize: int64, rows of the index that do not fit. present: int64 [tasks], examples of each
    task, fitting or not. shortest: the least that one takes. source: int [blocks].
    """

    def __init__(
        self,
        tokens: np.ndarray | Sizes,
        task: np.ndarray | Paired,
        group_of_task: Sequence[int],
        source: np.ndarray,
        weights: Sequence[float],
        starts: np.ndarray,
        *,
        budget: int,
        seed: int,
        shuffled: bool,
    ) -> None:
        """tokens, task, source: int [N], may be memory-mapped; task and source are numbers into
        `group_of_task` and `weights`. starts: from `single` or `together`."""
        # Plain views: indexing an np.memmap object itself is several times slower.
        self.tokens = tokens if isinstance(tokens, Sizes) else np.asarray(tokens)
        self.starts = starts
        self._task = task if isinstance(task, Paired) else np.asarray(task)
        self._group_of_task = np.asarray(group_of_task, np.int64)
        self._groups = int(self._group_of_task.max()) + 1
        self.weights = weights
        self.budget = budget
        self._seed, self._shuffled = seed, shuffled
        self.source = np.asarray(source)[starts[:-1]]
        self._scan()

    def _scan(self) -> None:
        """One pass over the columns, a few blocks at a time."""
        blocks, groups = len(self.starts) - 1, self._groups
        self.counts = np.zeros((groups, blocks), np.int32)
        self.present = np.zeros(len(self._group_of_task), np.int64)
        self.shortest = np.iinfo(np.int64).max
        oversize = []
        for first, last in self._strides():
            starts = self.starts[first : last + 1]
            tokens = self.tokens[starts[0] : starts[-1]]
            task = self._task[starts[0] : starts[-1]]
            shortest = int(tokens.min())
            if shortest < 1:
                row = int(starts[0]) + int(np.argmin(tokens))
                raise ValueError(f"row {row} of the index takes {shortest} positions")
            self.shortest = min(self.shortest, shortest)
            self.present += np.bincount(task, minlength=len(self.present))
            oversize.append(np.flatnonzero(tokens > self.budget) + starts[0])
            self.counts[:, first:last] = self._counted(starts, tokens, task)
        self.oversize = np.concatenate(oversize).astype(np.int64)
        self.examples = self.counts.sum(axis=1, dtype=np.int64)

    def _counted(self, starts: np.ndarray, tokens: np.ndarray, task: np.ndarray) -> np.ndarray:
        """int [groups, blocks]: examples that fit of the blocks between `starts`; of any number of
        groups one pass over these columns."""
        fits = tokens <= self.budget
        if self._groups == 1:
            return np.add.reduceat(fits, starts[:-1] - starts[0], dtype=np.int32)[None]
        blocks = len(starts) - 1
        block = np.repeat(np.arange(0, blocks * self._groups, self._groups), np.diff(starts))
        at = (block + self._group_of_task[task])[fits]
        found = np.bincount(at, minlength=blocks * self._groups)
        return found.reshape(blocks, self._groups).T

    def by_source(self, sources: int) -> np.ndarray:
        """int64 [groups, sources]: examples that fit."""
        return np.stack(
            [np.bincount(self.source, counts, sources).astype(np.int64) for counts in self.counts]
        )

    def positions(self, group: int) -> np.ndarray:
        """Positions in each block of the examples that fit, int64 [blocks]: reads the columns."""
        found = np.zeros(len(self.starts) - 1, np.int64)
        for first, last in self._strides():
            starts = self.starts[first : last + 1]
            tokens = self.tokens[starts[0] : starts[-1]]
            mine = self._fits(tokens, self._task[starts[0] : starts[-1]], group)
            found[first:last] = np.add.reduceat(
                np.where(mine, tokens, 0), starts[:-1] - starts[0], dtype=np.int64
            )
        return found

    def rows(self, group: int, blocks: np.ndarray) -> np.ndarray:
        """Rows of the index in these blocks, int64, block by block: those of the group that fit."""
        starts = self.starts[blocks]
        sizes = self.starts[blocks + 1] - starts
        rows = starts
        if int(sizes.sum()) > len(sizes):  # not of single examples
            before = np.cumsum(sizes) - sizes
            rows = np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))
        return rows[self.fits(rows, group)]

    def order(self, group: int, number: int) -> np.ndarray:
        """The blocks of cycle `number` in its order, int64, each as often as its source's weight
        says. None (empty) where a group is so small and its weights so low that it is not its turn.

        A weight of 2.3 gives every block twice and three tenths of them once more. Those tenths
        walk through a fixed random order of the source's blocks, so that over the cycles every
        block gets its share: two cycles at 0.5 are one pass.
        """
        blocks = np.flatnonzero(self.counts[group])
        source = self.source[blocks]
        weights = np.asarray(self.weights)[source]
        passes = [blocks[weights >= copy] for copy in range(1, math.floor(weights.max()) + 1)]
        extra = []
        for number_of_source in np.unique(source).tolist():
            share = self.weights[number_of_source] % 1
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

    def fits(self, rows: np.ndarray, group: int) -> np.ndarray:
        """bool: which of these rows of the index are of the group and fit."""
        return self._fits(self.tokens[rows], self._task[rows], group)

    def _fits(self, tokens: np.ndarray, task: np.ndarray, group: int) -> np.ndarray:
        fits = tokens <= self.budget
        return fits & (self._group_of_task[task] == group) if self._groups > 1 else fits

    def _strides(self) -> list[tuple[int, int]]:
        """Runs of blocks, first and last + 1, that hold about `_CHUNK` examples."""
        blocks = len(self.starts) - 1
        stride = max(1, _CHUNK // int(np.diff(self.starts).max()))
        return [(first, min(blocks, first + stride)) for first in range(0, blocks, stride)]


def together(source: np.ndarray, window: int, weights: Sequence[float]) -> np.ndarray:
    """Where blocks start that keep neighbours together, int64 [blocks + 1]; none spans two sources.

    Small sources and small windows have smaller blocks. Raises UserError where the weights would
    have a cycle of more than `MAX_VISITS` blocks written out.
    """
    edges = _edges(source)
    most = min(TOGETHER, max(1, window // 8))
    least = -(-len(source) // MAX_BLOCKS)
    sizes = [max(least, min(most, max(1, n // 256))) for n in np.diff(edges).tolist()]
    starts = _cut(edges, sizes)
    if float(np.asarray(weights, np.float64)[source[starts[:-1]]].sum()) > MAX_VISITS:
        raise _too_heavy(source, edges, weights)
    return starts


def single(source: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Where blocks start, int64 [blocks + 1]: of one example, where an epoch has up to `MAX_BLOCKS`
    of them, else of as few as make that many. None spans two sources.

    Raises UserError where the weights would make an epoch of more examples than was ever meant.
    """
    edges = _edges(source)
    examples = np.diff(edges)
    seen = float((np.asarray(weights, np.float64)[source[edges[:-1]]] * examples).sum())
    if seen > max(MAX_SEEN, MAX_PASSES * len(source)):
        raise _too_heavy(source, edges, weights)
    size = math.ceil(max(seen, len(source)) / MAX_BLOCKS)
    return _cut(edges, [size] * len(examples))


def counted(source: np.ndarray) -> np.ndarray:
    """Where blocks start that examples are only counted by, int64 [blocks + 1]; none spans two
    sources."""
    edges = _edges(source)
    size = max(COUNTED, math.ceil(len(source) / MAX_BLOCKS))
    return _cut(edges, [size] * (len(edges) - 1))


def _edges(source: np.ndarray) -> np.ndarray:
    """Where sources begin, and where the last ends, int64."""
    n = len(source)
    changes = [
        np.flatnonzero(np.diff(source[at : at + _CHUNK + 1])) + at + 1 for at in range(0, n, _CHUNK)
    ]
    edges = np.concatenate([[0], *changes, [n]]).astype(np.int64)
    if len(edges) > MAX_BLOCKS:
        raise UserError(
            f"the index changes its source {len(edges) - 1} times: sources must follow one another"
        )
    return edges


def _cut(edges: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Each stretch between two edges in blocks of its size, int64 [blocks + 1]."""
    pieces = [
        np.arange(start, stop, size)
        for start, stop, size in zip(edges[:-1].tolist(), edges[1:].tolist(), sizes, strict=True)
    ]
    return np.concatenate([*pieces, edges[-1:]]).astype(np.int64)


def too_heavy(examples: np.ndarray, seen: float, weights: Sequence[float]) -> None:
    """Raises UserError where weights make an epoch of more examples than was ever meant.

    examples: int [sources]. seen: examples of an epoch."""
    count = int(examples.sum())
    if seen > max(MAX_SEEN, MAX_PASSES * count) or seen > MAX_LONGER * max(1, count):
        raise _heavy(examples.astype(np.int64), weights)


def _too_heavy(source: np.ndarray, edges: np.ndarray, weights: Sequence[float]) -> UserError:
    """Weights that are counts or hours would have every pass of an epoch written out."""
    examples = np.bincount(source[edges[:-1]], np.diff(edges), len(weights)).astype(np.int64)
    return _heavy(examples, weights)


def _heavy(examples: np.ndarray, weights: Sequence[float]) -> UserError:
    factors = np.asarray(weights, np.float64)
    used = examples > 0
    heaviest = int(np.argmax(np.where(used, factors, 0)))
    shares = factors[used] / examples[used]
    meant = ", ".join(f"{share:.3g}" for share in shares / shares.max())
    return UserError(
        f"data.train.{heaviest}.weight: {factors[heaviest]:g}: each of its "
        f"{examples[heaviest]:,} examples would be seen {factors[heaviest]:,.0f} times an "
        f"epoch, {float((factors * examples).sum()):,.0f} examples with the other sources. A "
        "weight is how often a source is seen in an epoch, no number of clips or hours. Leave "
        "weights out to see every example once; as shares of what is seen yours would be "
        f"weight {meant}"
    )
