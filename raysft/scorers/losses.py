"""Losses of a task's right answers: of all terms together, and of each that has a name of its own.

Of text also the perplexity, per supervised token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from raysft.scorers.base import CROSS_ENTROPY, Figure, Loss, Scorer, Settings, Sums, added

SPEECH = {"flow": ("flow",), "stop": ("stop", "goes_on")}
"""Figures of losses of speech -> the terms whose mean they are."""


def _count(losses: Sequence[Loss], settings: Settings) -> Sums:
    parts = []
    for loss in losses:
        name = f"{loss.term} {loss.weight!r}"
        parts.append({f"sum {name}": loss.sum, f"count {name}": loss.count})
    return added(parts)


def _result(sums: Sums) -> dict[str, float]:
    means: dict[str, float] = {}
    total, counted = 0.0, False
    for key in [key for key in sums if key.startswith("sum ")]:
        _, term, weight = key.split(" ")
        if count := sums[f"count {term} {weight}"]:
            means[term] = sums[key] / count
            total, counted = total + float(weight) * means[term], True
    found = {"loss": total} if counted else {}
    if CROSS_ENTROPY in means:
        found["perplexity"] = math.exp(min(means[CROSS_ENTROPY], 700.0))
    for name, terms in SPEECH.items():
        if own := [means[term] for term in terms if term in means]:
            found[name] = sum(own) / len(own)
    return found


SCORER = Scorer(
    "losses",
    (Figure("loss"), Figure("perplexity"), *map(Figure, SPEECH)),
    _count,
    _result,
    wants="losses",
)
