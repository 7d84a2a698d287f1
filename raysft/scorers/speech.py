"""Losses of speech that is right: of its frames (`flow`), and of where it ends (`stop`)."""

from __future__ import annotations

from raysft.scorers.base import SPEAKING, Figure, Scorer, Sums
from raysft.scorers.losses import count, means_of

TERMS = {"flow": ("flow",), "stop": ("stop", "goes_on")}
"""Figures -> the terms whose mean they are."""


def _result(sums: Sums) -> dict[str, float]:
    means = {term: mean for (term, _), mean in means_of(sums).items()}
    found = {}
    for name, terms in TERMS.items():
        if own := [means[term] for term in terms if term in means]:
            found[name] = sum(own) / len(own)
    return found


SCORER = Scorer(
    "speech",
    tuple(map(Figure, TERMS)),
    count,
    _result,
    wants="losses",
    only=SPEAKING,
)
