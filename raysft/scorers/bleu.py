"""BLEU of a corpus with sacrebleu, of texts as they are (`evaluate.normalize` changes nothing).

Papineni et al. 2002: the n-grams of all answers that are in their references, 1 <= n <= 4, and the
lengths of both, are added up before anything is divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from raysft.errors import UserError
from raysft.scorers.base import TRANSLATED, Answer, Figure, Scorer, Settings, Sums, signature_of

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU

_ORDERS = range(1, 5)


@cache
def metric(tokenize: str) -> BLEU:
    """sacrebleu's, with its defaults. Raises UserError where it cannot make the words so."""
    from sacrebleu.metrics import BLEU  # here: the table is read where nothing is scored

    try:
        return BLEU(tokenize=tokenize, force=True)  # force: no warning of full stops; same score
    except (RuntimeError, ImportError) as error:  # what it says when a dictionary is missing
        raise UserError(
            f"evaluate.bleu_tokenize: {tokenize} is not installed here: on every node, pip install "
            f"'sacrebleu[{tokenize[:2]}]', or set it to char"
        ) from error


def tokenizer_of(settings: Settings, source: str) -> str:
    """What makes words of the texts of a source."""
    given = settings.bleu_tokenize
    return given if isinstance(given, str) else given.get(source, "13a")


def _count(answers: Sequence[Answer], settings: Settings) -> Sums:
    found = metric(tokenizer_of(settings, answers[0].source)).corpus_score(
        [answer.hypothesis for answer in answers], [[answer.reference for answer in answers]]
    )
    return {
        "words": found.sys_len,
        "reference words": found.ref_len,
        **{f"right {n}-grams": count for n, count in zip(_ORDERS, found.counts, strict=True)},
        **{f"{n}-grams": count for n, count in zip(_ORDERS, found.totals, strict=True)},
    }


def _result(sums: Sums) -> dict[str, float]:
    from sacrebleu.metrics import BLEU

    found = BLEU.compute_bleu(
        [sums[f"right {n}-grams"] for n in _ORDERS],
        [sums[f"{n}-grams"] for n in _ORDERS],
        sums["words"],
        sums["reference words"],
        smooth_method="exp",  # as `metric` has it by default
    )
    return {"bleu": found.score}


def _signature(settings: Settings, source: str) -> str:
    return signature_of(metric(tokenizer_of(settings, source)))


SCORER = Scorer(
    "bleu",
    (Figure("bleu", better="max"),),
    _count,
    _result,
    tasks=TRANSLATED,
    signature=_signature,
)
