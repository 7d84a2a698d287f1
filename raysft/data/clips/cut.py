"""Parts of a file: which samples they are, and one decode for several of them.

Stands under audio.py. Where a container can be entered anywhere (`Track.part`: samples as they are,
FLAC), a part costs what it is long; else the file is decoded from its beginning to the part's end,
for only so is a part the same as in the whole. `Shared` keeps that for the next part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from raysft.data.clips.file import MISSING_SHARE, Piece, resampled_length
from raysft.data.example import Audio
from raysft.errors import BadExample

KEPT = 1 << 28  # bytes of samples that are kept for other parts of their file


def sample_at(seconds: float, rate: int) -> int:
    """The sample nearest to a time, halves rounded up; of number / rate the one of that number."""
    return math.floor(seconds * rate + 0.5)


def bounds(clip: Audio, samples: int, rate: int) -> tuple[int, int]:
    """First sample of a part of a file, and last + 1; samples: that the file has, at `rate` Hz.

    What records say is rounded: a part may end as much behind its file as a file may be short of
    its header's promise (`MISSING_SHARE` of it), and then ends there. Raises BadExample.
    """
    stop = math.inf if clip.stop is None else clip.stop
    if not 0 <= clip.start < stop:  # nor where one of them is no number
        raise BadExample(
            f"{clip.path}: from {clip.start:g} to {stop:g} s is no part of a clip", "no such part"
        )
    first = sample_at(clip.start, rate)
    last = samples if clip.stop is None else sample_at(clip.stop, rate)
    if first >= samples or last - samples > MISSING_SHARE * (last - first):
        end = "its end" if clip.stop is None else f"{clip.stop:g} s"
        raise BadExample(
            f"{clip.path}: has {samples / rate:.2f} s, of which {clip.start:g} s to {end} is no "
            "part",
            "no such part",
        )
    return first, min(last, samples)


def length(pieces: list[Piece], rate: int) -> int:
    """Samples of a channel at `rate`, of all pieces together."""
    return sum(resampled_length(len(samples), own, rate) for samples, own in pieces)


@dataclass(frozen=True, slots=True)
class _Held:
    """A file decoded from its beginning. samples: of a channel; whole: there are no more."""

    key: Hashable
    pieces: list[Piece]
    samples: int
    whole: bool


class Shared:
    """The file of which a part was decoded last, as far as it was, if that is not too much."""

    def __init__(self) -> None:
        self._held: _Held | None = None

    def decode(
        self, key: Hashable, decode: Callable[[float], list[Piece]], most: float, rate: int
    ) -> list[Piece]:
        """Pieces with more than `most` samples, or all there are; not to be written to.

        key: of the file. decode: `Track.decode`. Asked for more and more of one file it decodes at
        least twice as much each time, so that all its parts cost as much as two decodes of it.
        """
        held = self._held  # as it is now: a thread that was given up may come back
        if held is not None and held.key == key:
            if held.whole or held.samples >= most:
                return held.pieces
            most = max(most, 2 * held.samples)
        pieces = decode(most)
        count = length(pieces, rate)
        kept = sum(samples.nbytes for samples, _ in pieces) <= KEPT
        self._held = _Held(key, pieces, count, count <= most) if kept else None
        return pieces

    def clear(self) -> None:
        """Keep nothing."""
        self._held = None
