"""Losses of a task's right answers: of all terms together; of text also the perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raysft.scorers.base import CROSS_ENTROPY, Figure, Loss, Scorer, Settings, Sums, added


def count(losses: Sequence[Loss], settings: Settings) -> Sums:
    """Sums and counts of each term."""
    parts = []
    for loss in losses:
        name = f"{loss.term} {loss.weight!r}"
        parts.append({f"sum {name}": loss.sum, f"count {name}": loss.tokens})
    return added(parts)


def means_of(sums: Sums) -> dict[tuple[str, float], float]:
    """Of each term, with its weight, that something was counted of."""
    found = {}
    for key in sums:
        kind, term, weight = key.split(" ")
        if kind == "sum" and (own := sums[f"count {term} {weight}"]):
            found[term, float(weight)] = sums[key] / own
    return found


def _result(sums: Sums) -> dict[str, float]:
    means = means_of(sums)
    if not means:
        return {}
    found = {"loss": sum(weight * mean for (_, weight), mean in means.items())}
    for (term, _), mean in means.items():
        if term == CROSS_ENTROPY:
            found["perplexity"] = math.exp(min(mean, 700.0))
    return found


SCORER = Scorer("losses", (Figure("loss"), Figure("perplexity")), count, _result, wants="losses")
