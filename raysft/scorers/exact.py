"""The share of answers that are their references, but for white space at the ends and between
words."""

from __future__ import annotations

from collections.abc import Sequence

from raysft.scorers.base import Answer, Figure, Scorer, Settings, Sums


def _count(answers: Sequence[Answer], settings: Settings) -> Sums:
    right = sum(answer.hypothesis.split() == answer.reference.split() for answer in answers)
    return {"right": right, "answers": len(answers)}


SCORER = Scorer(
    "exact",
    (Figure("exact_match", "percent", better="max"),),
    _count,
    lambda sums: {"exact_match": sums["right"] / sums["answers"]},
    tasks=("qa", "question_answering"),
)
