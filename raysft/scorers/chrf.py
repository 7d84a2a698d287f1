"""chrF of a corpus with sacrebleu (chrF2), of texts as they are (`evaluate.normalize` changes
nothing).

Popović 2015: characters' n-grams, 1 <= n <= 6, without spaces, of all answers, of all references,
and those in both, are added up before anything is divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from raysft.scorers.base import TRANSLATED, Answer, Figure, Scorer, Settings, Sums, signature_of

if TYPE_CHECKING:
    from sacrebleu.metrics import CHRF

_KINDS = [f"{kind} {n}-grams" for n in range(1, 7) for kind in ("said", "reference", "right")]


@cache
def _metric() -> CHRF:
    from sacrebleu.metrics import CHRF  # here: the table is read where nothing is scored

    return CHRF()


def _count(answers: Sequence[Answer], settings: Settings) -> Sums:
    # A score of sacrebleu's does not say what it was made of, unlike one of BLEU.
    each = _metric()._extract_corpus_statistics(
        [answer.hypothesis for answer in answers], [[answer.reference for answer in answers]]
    )
    return dict(zip(_KINDS, map(sum, zip(*each, strict=True)), strict=True))


def _result(sums: Sums) -> dict[str, float]:
    return {"chrf": _metric()._compute_f_score([sums[kind] for kind in _KINDS])}


SCORER = Scorer(
    "chrf",
    (Figure("chrf", better="max"),),
    _count,
    _result,
    tasks=TRANSLATED,
    signature=lambda settings, source: signature_of(_metric()),
)
