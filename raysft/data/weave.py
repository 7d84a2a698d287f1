"""Speech and text of one utterance woven into one row: USDM's interleaved pre-training data.

An utterance is units and words, each word on a run of units. It is cut into segments of about 500
units at beginnings of words; of each segment the text is taken or the units, and sometimes, behind
`<|correspond|>`, the other of the two as well; where the kind changes from one piece to the next
stands `<|continue|>`. What is taken is drawn anew at every step of training. After Kim et al.,
Paralinguistics-Aware Speech-Empowered Large Language Models (NeurIPS 2024), and its code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from raysft.errors import BadExample

CONTINUE, CORRESPOND = "<|continue|>", "<|correspond|>"
SEGMENT = 500  # units
_SAID = re.compile(r"[\w']+")


@dataclass(frozen=True, slots=True)
class Word:
    """A word (or several) and the units [start, stop) that it is spoken in."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What is said in `words`: as text, or as the units [start, stop). marker: the token that
    stands before it; "": none."""

    marker: str
    text: str
    start: int
    stop: int


def on_units(intervals: Sequence[tuple[str, float, float]], units: int) -> list[Word]:
    """Words on units: intervals of an alignment (word, start, end in seconds; a word without a
    letter is silence), which follow each other, over `units` units.

    A silence at the beginning joins the first word, at the end the last; in between it is halved.
    Borders are the units nearest to their times, of units of equal length up to the last end. A
    word that comes to no unit is joined to the next, or to the one before. Raises BadExample: fewer
    than three intervals, nothing said, times that do not grow.
    """
    if len(intervals) < 3:
        raise BadExample(
            f"its alignment has {len(intervals)} intervals, expected 3 or more", "malformed record"
        )
    last = intervals[-1][2]
    times = [time for _, start, end in intervals for time in (start, end)]
    if any(b < a - 1e-3 for a, b in pairwise(times)) or last <= 0:
        raise BadExample("its alignment's times do not grow", "malformed record")
    spoken: list[tuple[str, float, float]] = []
    silence = 0.0
    for word, start, end in intervals:
        text = " ".join(_SAID.findall(word.lower()))
        if not text:
            silence += end - start
            continue
        if spoken:
            middle = spoken[-1][2] + (start - spoken[-1][2]) / 2
            spoken[-1] = (*spoken[-1][:2], middle)
            start = middle
        else:
            start = intervals[0][1]
        spoken.append((text, start, end))
    if not spoken:
        raise BadExample("its alignment has no word", "malformed record")
    spoken[-1] = (*spoken[-1][:2], last)
    ratio = units / last
    words = [Word(text, round(start * ratio), round(end * ratio)) for text, start, end in spoken]
    return _joined(words)


def _joined(words: list[Word]) -> list[Word]:
    found: list[Word] = []
    before = ""
    for number, word in enumerate(words):
        text = f"{before} {word.text}".strip()
        if word.stop > word.start:
            found.append(Word(text, word.start, word.stop))
            before = ""
        elif number + 1 < len(words) or not found:
            before = text
        else:
            found[-1] = Word(f"{found[-1].text} {text}", found[-1].start, found[-1].stop)
            before = ""
    if before and found:
        found[-1] = Word(f"{found[-1].text} {before}", found[-1].start, found[-1].stop)
    return found


def cut(words: Sequence[Word], rng: np.random.Generator) -> list[Sequence[Word]]:
    """Segments: S = N // 500 + 1 for N units; the cut k of S - 1 is the beginning of a word that is
    nearest to a draw from a normal distribution of mean kN/S and deviation N/2S, between mean - N/S
    and mean + N/S. Cuts at the same word, or at the first, are one less."""
    from scipy.special import ndtr, ndtri

    end = words[-1].stop
    segments = end // SEGMENT + 1
    starts = np.array([word.start for word in words])
    low, high = ndtr(-2.0), ndtr(2.0)  # the bounds are two deviations away
    places = {0}
    for k in range(1, segments):
        draw = k * end / segments + end / (2 * segments) * ndtri(low + rng.random() * (high - low))
        places.add(int(np.abs(starts - draw).argmin()))
    edges = [*sorted(places), len(words)]
    return [words[a:b] for a, b in pairwise(edges)]


def woven(words: Sequence[Word], rng: np.random.Generator) -> list[Piece]:
    """The pieces of an utterance, in order, as one draw has them."""
    pieces: list[Piece] = []
    before: bool | None = None  # whether the last piece is text
    for segment in cut(words, rng):
        text = bool(rng.random() < 0.5)
        pieces.append(_piece(segment, text, CONTINUE if before not in (None, text) else ""))
        before = text
        if rng.random() < 0.5:
            pieces.append(_piece(segment, not text, CORRESPOND))
            before = not text
    return pieces


def longest(words: Sequence[Word]) -> list[Piece]:
    """Pieces that take as many positions as any draw has, or more: everything twice, word by word,
    with as many markers as there can be."""
    end = words[-1].stop
    most = 2 * (end // SEGMENT + 1)
    pieces = [Piece("", f" {word.text}", 0, 0) for word in words]
    pieces.append(Piece("", "", words[0].start, end))
    return [*pieces, *(Piece(CONTINUE, "", 0, 0) for _ in range(most))]


def _piece(segment: Sequence[Word], text: bool, marker: str) -> Piece:
    if text:
        return Piece(marker, " ".join(word.text for word in segment), 0, 0)
    return Piece(marker, "", segment[0].start, segment[-1].stop)
