"""Ratings against the mean of raters: errors and correlations of what the model answered, and of
the mean of its probabilities; scores that are missing; the raters' own agreement.

A score that is missing is counted, and in no other figure. By dimension, with intervals: in the
files beside an evaluation's answers (`raysft.run.judged`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from raysft.scorers import agreement
from raysft.scorers.base import Answer, Figure, Scorer, Settings, Sums
from raysft.scorers.rated import Rated

TASK = "rating"
_INSIDE = re.compile(r"answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Scored:
    """One dimension of an answer. model: what it says; probability: the mean of its probabilities;
    None: missing."""

    rated: Rated
    model: int | None
    probability: float | None


def inside(text: str) -> tuple[int, int] | None:
    """Where in a text the answer's tags begin and end what they hold; None: there are none."""
    found = _INSIDE.search(text)
    return None if found is None else found.span(1)


def digit_at(text: str, label: str = "") -> int | None:
    """Where the first whole number inside the answer's tags stands, behind [label] where there is
    one; None: there is none (N/A, no tags)."""
    span = inside(text)
    if span is None:
        return None
    start, stop = span
    if label:
        at = text.find(f"[{label}]", start, stop)
        if at < 0:
            return None
        start = at + len(label) + 2
        following = text.find("[", start, stop)
        stop = stop if following < 0 else following
    found = _NUMBER.search(text, start, stop)
    return None if found is None else found.start()


def model_score(text: str, rated: Rated) -> int | None:
    """The rating in an answer: the first whole number inside its tags; None: there is none, or it
    is outside of the scale."""
    at = digit_at(text, rated.label)
    if at is None:
        return None
    found = _NUMBER.match(text, at)
    assert found is not None
    number = int(found[0])
    return number if rated.lowest <= number <= rated.highest else None


def scored(answer: Answer) -> list[Scored]:
    """Its dimensions; none where nobody rated it."""
    chances = answer.probability or (None,) * len(answer.rated)
    return [
        Scored(rated, model_score(answer.hypothesis, rated), chance)
        for rated, chance in zip(answer.rated, chances, strict=True)
    ]


def _count(answers: Sequence[Answer], settings: Settings) -> Sums:
    return {"scored": [one for answer in answers for one in scored(answer)]}


def _result(sums: Sums) -> dict[str, float]:
    # In an order that does not depend on which worker answered what.
    found: list[Scored] = sorted(
        sums["scored"], key=lambda one: (one.rated.original, one.rated.dimension, str(one))
    )
    if not found:
        return {}
    figures = {"missing_scores": sum(one.model is None for one in found) / len(found)}
    told = [(one.rated.truth, one.model) for one in found if one.model is not None]
    figures |= agreement.figures(*_columns(told))
    chances = [(one.rated.truth, one.probability) for one in found if one.probability is not None]
    for name, value in agreement.figures(*_columns(chances)).items():
        figures[f"probability_{name}"] = value
    agreed = agreement.alpha([one.rated.ratings for one in found])
    return figures if agreed is None else figures | {"rater_alpha": agreed}


def _columns(rows: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [row[0] for row in rows], [row[1] for row in rows]


_ERRORS = ("mae", "mse", "rmse")
SCORER = Scorer(
    "ratings",
    (
        *(Figure(name, better="max") for name in ("spearman", "pearson", "r2")),
        *map(Figure, _ERRORS),
        *map(Figure, ("spearman_p", "pearson_p")),
        *(Figure(f"probability_{name}", better="max") for name in ("spearman", "pearson", "r2")),
        *(Figure(f"probability_{name}") for name in (*_ERRORS, "spearman_p", "pearson_p")),
        Figure("missing_scores", "percent"),
        Figure("rater_alpha", better="max"),
    ),
    _count,
    _result,
    tasks=(TASK,),
)
