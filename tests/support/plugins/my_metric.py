"""A metric: the share of answers that are right to the letter."""

from __future__ import annotations

from collections.abc import Sequence

from raysft.scorers import Answer, Figure, Scorer, Sums, register
from raysft.scorers.base import Settings


def _count(answers: Sequence[Answer], settings: Settings) -> Sums:
    return {"right": sum(a.reference == a.hypothesis for a in answers), "all": len(answers)}


ROW = Scorer(
    "exact_match",
    (Figure("exact", "percent", better="max"),),
    _count,
    lambda sums: {"exact": sums["right"] / sums["all"]},
)
register(ROW)
