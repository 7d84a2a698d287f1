"""Filling micro-batches: from the lengths of a window's examples to groups of them within a budget.

sources -> index -> plan (here: the arithmetic inside one window) -> stream -> step -> ...
Pure functions on lengths: no I/O, and no randomness but what is given. Every function returns
positions into `lengths`; lengths and budgets are model positions, and 1 <= length <= budget is the
caller's promise.

`packed`   sequences share a row, the row holds at most `budget` positions. Best-fit decreasing, but
           for one thing: the long examples are dealt evenly to as few rows as hold all, or up to
           0.5% more rows than best fit alone needs. Best fit alone puts the longest together and
           the shortest together, and as attention costs the square of a length, lanes would wait
           for one another: with 8 lanes of log-normal speech (mean 6 s) the sum of squares in a
           step's dearest lane is 1.4 times the mean at 80 s a row and 1.05 times at 600 s, with
           best fit alone 2.1 and 2.3 times. Only where each row holds few examples, none of them
           short enough to fill it up, is best fit alone what is left.
`padded`   every sequence is padded to the longest of its batch: n x longest <= budget. Sorted by
           length and cut from the longest down, which leaves the short remainder to short ones.
`in_order` either, keeping the order given: a row is closed when the next example does not fit.

Who comes to lie with whom is a matter of lengths, so the same window would be filled the same way
in every epoch. `noise` shakes the lengths before they are sorted: by up to a fifth where rows are
dealt out, to the double where they are filled up (both for no more rows), and by 1.6% for padded
batches, where it costs 0.4% padding. So pairs of one row meet again in the next filling of the same
window 1.0 to 1.8 times as often as by chance (without noise 160 times). Examples of a padded batch
have to be alike in length, and there are few that are: 4 to 8 of 10 pairs meet again there.

Cost: O(n log n); 1 to 2 microseconds an example for `packed`, up to 4 where rows are short; a tenth
of that for `padded`.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heapreplace

import numpy as np

# A row and its free space travel as one integer, so that sorting and heaps need no tuples.
_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1
# Share of the positions dealt evenly; the rest, the shortest examples, fill the rows up. Where they
# do not do that, a smaller share is tried.
EVEN = 0.75
_LESS_EVEN = 0.5
# Rows that even dealing may take more than best fit alone.
_MORE_ROWS = 0.005
# Lengths are multiplied by up to 1 + 1 / this before they are sorted.
_SHAKEN_DEALT = 5
_SHAKEN_REST = 1
_SHAKEN_BATCHES = 64


def packed(lengths: np.ndarray, budget: int, noise: np.ndarray | None = None) -> list[np.ndarray]:
    """Rows of at most `budget` positions that together hold every example once.

    lengths: int [n]. noise: int64 [n] from 0 to 65,535, by which the lengths are shaken for
    sorting; None: equal lengths keep their given order, and nothing else is drawn.
    Returns int64 arrays of positions.
    """
    if len(lengths) == 0:
        return []
    lengths = lengths.astype(np.int64)
    fewest = -(-int(lengths.sum()) // budget)
    order = _dealt(lengths, noise, EVEN)
    row_of = fill(lengths[order].tolist(), budget, fewest, EVEN)
    if max(row_of) < fewest:
        return rows(order, row_of)
    plain = falling(lengths)
    alone = fill(lengths[plain].tolist(), budget, 0, 0)
    most = int((max(alone) + 1) * (1 + _MORE_ROWS))
    for share in (EVEN, _LESS_EVEN, 0):
        order = _dealt(lengths, noise, share)
        row_of = fill(lengths[order].tolist(), budget, most if share else 0, share)
        if max(row_of) < most:
            return rows(order, row_of)
    return rows(plain, alone)


def padded(lengths: np.ndarray, budget: int, noise: np.ndarray | None = None) -> list[np.ndarray]:
    """Batches with n x longest <= budget that together hold every example once, similar lengths
    together; from the longest batch to the shortest. noise: as in `packed`."""
    lengths = lengths.astype(np.int64)
    order = falling(_shaken(lengths, noise, _SHAKEN_BATCHES))
    lengths = lengths[order]
    batches, start = [], 0
    while start < len(order):
        stop = start + budget // int(lengths[start])
        # Shaken, the first is not quite the longest.
        stop = start + budget // int(lengths[start:stop].max())
        batches.append(order[start:stop])
        start = stop
    return batches


def in_order(lengths: np.ndarray, budget: int, pad: bool) -> list[np.ndarray]:
    """Runs of consecutive examples, each within the budget as `packed` (pad=False) or `padded`
    (pad=True) count it."""
    if len(lengths) == 0:
        return []
    starts, used, longest, count = [], 0, 0, 0
    for position, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        count += 1
        used = count * longest if pad else used + length
        if used > budget or position == 0:
            starts.append(position)
            used, longest, count = length, length, 1
    positions = np.arange(len(lengths))
    return [
        positions[start:stop]
        for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True)
    ]


def choose(lengths: np.ndarray, amount: int) -> np.ndarray:
    """Which examples to set aside so that about `amount` positions leave: bool [n].

    The first examples that fit into `amount`, and one more that brings the sum to `amount` or
    just above it; all examples if they hold no more than `amount`.
    """
    total = np.cumsum(lengths, dtype=np.int64)
    count = int(np.searchsorted(total, amount, side="right"))
    chosen = np.arange(len(lengths)) < count
    if count < len(lengths):
        gap = amount - (int(total[count - 1]) if count else 0)
        rest = lengths[count:].astype(np.int64)
        if gap > 0:
            # lengths[count] is at least the gap: it did not fit.
            chosen[count + int(np.argmin(np.where(rest >= gap, rest, np.iinfo(np.int64).max)))] = (
                True
            )
    return chosen


def falling(lengths: np.ndarray) -> np.ndarray:
    """Positions from the longest to the shortest; equal ones in their given order."""
    return np.argsort(-lengths, kind="stable")


def _shaken(lengths: np.ndarray, noise: np.ndarray | None, by: int) -> np.ndarray:
    """Lengths to sort by, int64: each times 65,536 x `by` and up to 65,535 more."""
    return lengths if noise is None else lengths * ((by << 16) + noise)


def _dealt(lengths: np.ndarray, noise: np.ndarray | None, share: float) -> np.ndarray:
    """Positions in the order of `fill`: the longest, with `share` of all positions, then the rest,
    which is shaken more: best fit puts what follows one another into one row."""
    order = falling(_shaken(lengths, noise, _SHAKEN_DEALT))
    total = np.cumsum(lengths[order])
    count = int(np.searchsorted(total, share * total[-1])) + 1 if share else 0
    last = np.ones(len(lengths), bool)
    last[order[:count]] = False
    rest = np.flatnonzero(last)
    of_rest = None if noise is None else noise[rest]
    return np.concatenate(
        [order[:count], rest[falling(_shaken(lengths[rest], of_rest, _SHAKEN_REST))]]
    )


def fill(lengths: list[int], budget: int, even: int, share: float) -> list[int]:
    """The row of each example, lengths given about from the longest down.

    With even > 0 the first examples, those with `share` of all positions, are dealt to that many
    rows, always to the emptiest. The others go to the fullest row that can still hold them (best
    fit), or begin a new row.
    """
    row_of: list[int] = []
    used = list(range(even))  # (positions << bits) + row; a sorted list is a heap
    left = sum(lengths)
    rest = int((1 - share) * left) if even else left
    for length in lengths:
        if left <= rest:
            break
        filled = used[0] + (length << _ROW_BITS)
        if filled >> _ROW_BITS > budget:
            break
        row_of.append(filled & _ROW_MASK)
        heapreplace(used, filled)
        left -= length

    # (free positions << bits) + row, rising; full rows are left out from here on
    free = sorted(
        ((budget - (entry >> _ROW_BITS)) << _ROW_BITS) + (entry & _ROW_MASK) for entry in used
    )
    count, shortest = even, min(lengths)
    for length in lengths[len(row_of) :]:
        at = bisect_left(free, length << _ROW_BITS)
        if at == len(free):
            space, row = budget - length, count
            count += 1
        else:
            entry = free.pop(at)
            space, row = (entry >> _ROW_BITS) - length, entry & _ROW_MASK
        row_of.append(row)
        if space >= shortest:
            entry = (space << _ROW_BITS) + row
            free.insert(bisect_left(free, entry), entry)
    return row_of


def rows(order: np.ndarray, row_of: list[int]) -> list[np.ndarray]:
    """Examples grouped by row: `order[i]` lies in row `row_of[i]`. No row is empty."""
    number = np.array(row_of, np.int64)
    flat = order[np.argsort(number, kind="stable")]
    sizes = np.bincount(number)
    stops = np.cumsum(sizes[sizes > 0]).tolist()
    return [flat[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
