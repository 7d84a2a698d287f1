"""A data file that has changed: what was measured of the chunks that are still in it.

Between a cached part and what is left to measure (build.py). A chunk is known again by its digest,
wherever it lies by now: lines that were appended, changed, inserted or taken out cost the chunks
they are in, and most often no other (sources.base.ends_chunk). Costs: moving the places of all
examples, 50 ns each; items that came to nothing are looked at again where their line is another,
for their reason names it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from raysft.data.clips.states import Piece
from raysft.data.index.part import Part, Rejected, renumber
from raysft.data.sources.base import Chunk


def fit(part: Part, chunks: Sequence[Chunk]) -> tuple[Part, list[Chunk]]:
    """What of `part` holds for a file that has these chunks now, in its places there, and the
    chunks of which nothing is known. The part itself where nothing has changed."""
    before = [chunk for chunk, _ in part.chunks]
    if [_facts(chunk) for chunk in before] == [_facts(chunk) for chunk in chunks]:
        return part, []
    left: dict[str, list[int]] = defaultdict(list)
    for number in reversed(range(len(before))):
        left[before[number].digest].append(number)
    known = {}  # number of an old chunk -> the chunk that it is now
    fresh = []
    for chunk in chunks:
        if left[chunk.digest]:
            known[left[chunk.digest].pop()] = chunk
        else:
            fresh.append(chunk)
    return _Moves(before, known).part(part), fresh


def _facts(chunk: Chunk) -> tuple[int, int, int, str]:
    return chunk.start, chunk.stop, chunk.first, chunk.digest


class _Moves:
    """Where the lines of a file have gone; `stays`, `lines`, `bytes`: by old chunk."""

    def __init__(self, before: list[Chunk], known: dict[int, Chunk]) -> None:
        self._known = known
        self._firsts = np.array([chunk.first for chunk in before], np.int64)
        self._stays = np.array([number in known for number in range(len(before))], bool)
        now = [known.get(number, chunk) for number, chunk in enumerate(before)]
        moves = [(b.first - a.first, b.start - a.start) for a, b in zip(before, now)]
        self._lines, self._bytes = np.array(moves, np.int64).reshape(-1, 2).T

    def _chunk(self, line: int) -> int:
        return int(np.searchsorted(self._firsts, line, side="right")) - 1

    def part(self, part: Part) -> Part:
        rows = part.rows
        chunk = np.searchsorted(self._firsts, rows["line"], side="right") - 1
        rows, chunk = rows[self._stays[chunk]], chunk[self._stays[chunk]]
        rows["line"] += self._lines[chunk]
        rows["offset"] += self._bytes[chunk]
        rows = rows[np.argsort(rows["line"], kind="stable")]
        chunks = [(self._known[n], part.chunks[n][1]) for n in self._known]
        tasks = sorted({task for _, of_chunk in chunks for task in of_chunk})
        rows["task"] = renumber(part.tasks, tasks)[rows["task"]]
        rejected = [item for old in part.rejected for item in self._rejected(old)]
        clips = [piece for old in part.clips for piece in self._pieces(old)]
        return Part(rows, tasks, rejected, tuple(clips), tuple(chunks), part.langs)

    def _rejected(self, item: Rejected) -> list[Rejected]:
        number = self._chunk(item.line)
        if not self._stays[number]:
            return []
        lines = int(self._lines[number])
        offset = item.offset + int(self._bytes[number])
        # Of another line: looked at again, as one whose clip is.
        audio = item.audio or lines != 0
        return [replace(item, line=item.line + lines, offset=offset, audio=audio)]

    def _pieces(self, piece: Piece) -> list[Piece]:
        first, last = self._chunk(piece.low), self._chunk(piece.high)
        moves = set(self._lines[first : last + 1].tolist())
        if len(moves) == 1 and self._stays[first : last + 1].all():
            return [piece.moved(moves.pop())]

        def move(line: int) -> int | None:
            number = self._chunk(line)
            return int(self._lines[number]) if self._stays[number] else None

        return piece.split(move)
