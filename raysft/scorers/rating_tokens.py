"""How many learnt tokens of right ratings the model would have said, in all and by true score:
counts over all workers and batches."""

from __future__ import annotations

from collections.abc import Sequence

from raysft.scorers.base import Figure, Loss, Scorer, Settings, Sums, added
from raysft.scorers.ratings import TASK

TERM = "token_right"
SCORES = range(6)  # those that have a figure
SEEN, RIGHT = "score_seen_{}", "score_right_{}"
"""Terms of a true score: tokens that are its digit, and those of them that were right."""
TERMS = {TERM, *(name.format(score) for score in SCORES for name in (SEEN, RIGHT))}


def _count(losses: Sequence[Loss], settings: Settings) -> Sums:
    own = [loss for loss in losses if loss.term in TERMS]
    parts = [{f"{loss.term} sum": loss.sum, f"{loss.term} of": loss.tokens} for loss in own]
    return added(parts)


def _result(sums: Sums) -> dict[str, float]:
    found = {}
    if sums.get(f"{TERM} of"):
        found["token_accuracy"] = sums[f"{TERM} sum"] / sums[f"{TERM} of"]
    for score in SCORES:
        if seen := sums.get(f"{SEEN.format(score)} sum"):
            found[f"accuracy_of_{score}"] = sums[f"{RIGHT.format(score)} sum"] / seen
    return found


SCORER = Scorer(
    "rating_tokens",
    tuple(
        Figure(name, "percent", better="max")
        for name in ("token_accuracy", *(f"accuracy_of_{score}" for score in SCORES))
    ),
    _count,
    _result,
    wants="losses",
    only=(TASK,),
)
