"""Of pairs of answers, how often the model finds the chosen one likelier, and by how much.

By the probabilities of whole answers, of the model alone: no reference is asked.
"""

from __future__ import annotations

from collections.abc import Sequence

from raysft.scorers.base import Figure, Loss, Scorer, Settings, Sums, added

PREFERRED, MARGIN = "preferred", "preferred_margin"


def _count(losses: Sequence[Loss], settings: Settings) -> Sums:
    own = [loss for loss in losses if loss.term in (PREFERRED, MARGIN)]
    return added([{f"{loss.term} sum": loss.sum, f"{loss.term} of": loss.tokens} for loss in own])


def _result(sums: Sums) -> dict[str, float]:
    return {
        name: sums[f"{name} sum"] / sums[f"{name} of"]
        for name in (PREFERRED, MARGIN)
        if sums.get(f"{name} of")
    }


SCORER = Scorer(
    "preferences",
    (Figure(PREFERRED, "percent", better="max"), Figure(MARGIN, better="max")),
    _count,
    _result,
    wants="losses",
    objective="dpo",
)
