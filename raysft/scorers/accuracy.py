"""The share of answers that are their references once `evaluate.normalize` has made both
comparable: a class said with a capital or a full stop is that class."""

from __future__ import annotations

from collections.abc import Sequence

from raysft.scorers.base import Answer, Figure, Scorer, Settings, Sums
from raysft.scorers.normalize import normalize


def _count(answers: Sequence[Answer], settings: Settings) -> Sums:
    def shown(text: str) -> str:
        return normalize(text, settings.normalize, settings.spelling).strip()

    right = sum(shown(answer.hypothesis) == shown(answer.reference) for answer in answers)
    return {"right": right, "answers": len(answers)}


SCORER = Scorer(
    "accuracy",
    (Figure("accuracy", "percent", better="max"),),
    _count,
    lambda sums: {"accuracy": sums["right"] / sums["answers"]},
    tasks=("classification",),
)
