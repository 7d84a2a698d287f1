"""A dialogue cut into what encoders take: runs of text ids, clips and rows of units.

Stands between `text.Template`, whose tokenizer gives one row of ids with a token for each clip or
row of units, and the encoders, which know what those become.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from raysft.data.example import Audio, Units
from raysft.errors import BadExample

Segment = np.ndarray | Audio | Units


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as the model reads it: text as int32 ids, audio and units still as they are.

    learnt: for each segment whether the model is to learn it; of an answer the end token too.
    """

    segments: list[Segment]
    learnt: list[bool]

    @property
    def prompt(self) -> list[Segment]:
        """What is given, all of it."""
        return [s for s, learnt in zip(self.segments, self.learnt, strict=True) if not learnt]

    @property
    def answer(self) -> list[Segment]:
        """What is learnt, all of it."""
        return [s for s, learnt in zip(self.segments, self.learnt, strict=True) if learnt]

    def until_learnt(self) -> Rendered:
        """Without what follows the last that is learnt: nothing depends on it."""
        end = max((at + 1 for at, learnt in enumerate(self.learnt) if learnt), default=0)
        return Rendered(self.segments[:end], self.learnt[:end])


def bare(given: list[Audio | Units], learnt: list[Audio | Units]) -> Rendered:
    """Parts without text."""
    return Rendered([*given, *learnt], [False] * len(given) + [True] * len(learnt))


def cut(
    ids: list[int], learnt: np.ndarray, others: list[Audio | Units], hole: int | None
) -> Rendered:
    """Ids cut where learning begins or ends, and at the tokens that stand for `others`.

    learnt: bool, for each id. hole: the token that stands for a part. Raises BadExample where there
    are not as many as `others`.
    """
    row = np.array(ids, np.int32)
    places: list[int] = []
    if hole is not None:
        for _ in range(ids.count(hole)):
            places.append(ids.index(hole, places[-1] + 1 if places else 0))
    if len(places) != len(others):
        raise BadExample(
            f"the chat template shows {len(places)} of its {len(others)} clips or rows of units"
        )
    edges = (learnt[1:] != learnt[:-1]).nonzero()[0] + 1
    cuts = sorted({0, len(ids), *edges.tolist(), *places, *(place + 1 for place in places)})
    rest = iter(others)
    segments: list[Segment] = []
    flags: list[bool] = []
    for start, stop in pairwise(cuts):
        segments.append(next(rest) if start in places else row[start:stop])
        flags.append(bool(learnt[start]))
    return Rendered(segments, flags)
