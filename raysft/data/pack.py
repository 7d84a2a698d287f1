"""Filling micro-batches: from the lengths of a window's examples to groups of them within a budget.

sources -> index -> plan (here: the arithmetic inside one window) -> stream -> step -> ...
Pure functions on lengths: no randomness, no I/O. Every function returns positions into `lengths`;
lengths and budgets are model positions, and 1 <= length <= budget is the caller's promise.

`packed`   sequences share a row, the row holds at most `budget` positions. Best-fit decreasing, but
           for one thing: the long examples are dealt evenly to the fewest rows that could hold all.
           Best fit alone puts the longest together and the shortest together, and as attention
           costs the square of a length, lanes would wait for one another: with 8 lanes of
           log-normal speech (mean 6 s) the sum of squares in a step's dearest lane is 1.4 times
           the mean at 80 s a row and 1.05 times at 600 s, with best fit alone 2.2 and 2.3 times.
           The rows are never more than best fit alone needs.
`padded`   every sequence is padded to the longest of its batch: n x longest <= budget. Sorted by
           length and cut from the longest down, which leaves the short remainder to short ones.
`in_order` either, keeping the order given: a row is closed when the next example does not fit.

Cost: O(n log n); 1 to 2 microseconds an example for `packed`, a tenth of that for `padded`.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heapreplace

import numpy as np

# A row and its free space travel as one integer, so that sorting and heaps need no tuples.
_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1
# Share of the positions dealt evenly; the rest, the shortest examples, fill the rows up.
_EVEN = 0.75


def packed(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Rows of at most `budget` positions that together hold every example once.

    lengths: int [n]. Returns int64 arrays of positions. Equal lengths keep their given order, so
    shuffling the examples beforehand changes which of them meet.
    """
    if len(lengths) == 0:
        return []
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    falling = lengths[order].tolist()
    fewest = -(-sum(falling) // budget)
    row_of = _fill(falling, budget, fewest)
    if max(row_of) >= fewest:
        row_of = min(row_of, _fill(falling, budget, 0), key=max)
    return _rows(order, np.array(row_of, np.int64))


def padded(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Batches with n x longest <= budget that together hold every example once, similar lengths
    together; from the longest batch to the shortest."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        stop = start + budget // int(lengths[order[start]])
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


def _fill(falling: list[int], budget: int, even: int) -> list[int]:
    """The row of each example, lengths given from the longest down.

    With even > 0 the long examples, those with the first _EVEN of all positions, are dealt to that
    many rows, always to the emptiest. The others go to the fullest row that can still hold them
    (best fit), or begin a new row.
    """
    row_of: list[int] = []
    used = list(range(even))  # (positions << bits) + row; a sorted list is a heap
    left = sum(falling)
    rest = int((1 - _EVEN) * left) if even else left
    for length in falling:
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
    rows, shortest = even, falling[-1]
    for length in falling[len(row_of) :]:
        at = bisect_left(free, length << _ROW_BITS)
        if at == len(free):
            space, row = budget - length, rows
            rows += 1
        else:
            entry = free.pop(at)
            space, row = (entry >> _ROW_BITS) - length, entry & _ROW_MASK
        row_of.append(row)
        if space >= shortest:
            entry = (space << _ROW_BITS) + row
            free.insert(bisect_left(free, entry), entry)
    return row_of


def _rows(order: np.ndarray, row_of: np.ndarray) -> list[np.ndarray]:
    """Examples grouped by row: `order[i]` lies in row `row_of[i]`."""
    flat = order[np.argsort(row_of, kind="stable")]
    stops = np.cumsum(np.bincount(row_of)).tolist()
    return [flat[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
