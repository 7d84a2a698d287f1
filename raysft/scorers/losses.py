"""Loss and perplexity of a task's right answers, per supervised token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raysft.scorers.base import Figure, Loss, Scorer, Settings, Sums, added


def _count(losses: Sequence[Loss], settings: Settings) -> Sums:
    return added({"loss": loss.sum, "tokens": loss.tokens} for loss in losses)


def _result(sums: Sums) -> dict[str, float]:
    if not sums["tokens"]:
        return {}
    loss = sums["loss"] / sums["tokens"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


SCORER = Scorer("losses", (Figure("loss"), Figure("perplexity")), _count, _result, wants="losses")
