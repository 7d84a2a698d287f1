"""Word and character error rate with jiwer, after a normalisation that the config names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raysft.scorers.base import Answer, Figure, Scorer, Settings, Sums
from raysft.scorers.normalize import normalize, words

if TYPE_CHECKING:
    import jiwer


def error_rates(
    references: Sequence[str],
    hypotheses: Sequence[str],
    steps: Sequence[str],
    spelling: str | None = None,
) -> dict[str, float]:
    """{"wer", "cer"} over all pairs: errors summed, divided by the reference's words / characters.

    steps, spelling: see `normalize`. A reference that is empty after normalisation (silence, noise)
    counts every hypothesis word as an insertion. Where all are, those are divided by the number of
    references: words that were heard in a clip without any. Raises ValueError without references.
    """
    if not references:
        raise ValueError("no references: there is nothing to divide by")
    return _result(_errors(references, hypotheses, steps, spelling))


def _count(answers: Sequence[Answer], settings: Settings) -> Sums:
    return _errors(
        [answer.reference for answer in answers],
        [answer.hypothesis for answer in answers],
        settings.normalize,
        settings.spelling,
    )


def _result(sums: Sums) -> dict[str, float]:
    return {
        "wer": sums["word errors"] / (sums["words"] or sums["references"]),
        "cer": sums["character errors"] / (sums["characters"] or sums["references"]),
    }


SCORER = Scorer(
    "error_rates", (Figure("wer", "percent"), Figure("cer", "percent")), _count, _result
)


def _errors(
    references: Sequence[str],
    hypotheses: Sequence[str],
    steps: Sequence[str],
    spelling: str | None,
) -> Sums:
    """Errors, and the words and characters of references, as whole numbers."""
    import jiwer  # here: the table is read where nothing is scored

    pairs = [
        (normalize(r, steps, spelling), normalize(h, steps, spelling))
        for r, h in zip(references, hypotheses, strict=True)
    ]
    word_errors, spoken = _aligned(pairs, words, lambda parts: jiwer.process_words(*_joined(parts)))
    character_errors, characters = _aligned(
        [(r.strip(), h.strip()) for r, h in pairs],
        list,
        lambda parts: jiwer.process_characters(*_joined(parts, "")),
    )
    return {
        "references": len(pairs),
        "words": spoken,
        "word errors": word_errors,
        "characters": characters,
        "character errors": character_errors,
    }


def _aligned(
    pairs: list[tuple[str, str]],
    split: Callable[[str], list[str]],
    align: Callable[[list[list[list[str]]]], jiwer.WordOutput | jiwer.CharacterOutput],
) -> tuple[int, int]:
    """Errors in units that `split` makes, and how many of them the references have."""
    parts = [(split(r), split(h)) for r, h in pairs]
    spoken = [pair for pair in parts if pair[0]]
    inserted = sum(len(h) for r, h in parts if not r)
    if not spoken:
        return inserted, 0
    output = align([[r for r, _ in spoken], [h for _, h in spoken]])
    errors = output.substitutions + output.deletions + output.insertions
    return errors + inserted, output.hits + output.substitutions + output.deletions


def _joined(parts: list[list[list[str]]], between: str = " ") -> tuple[list[str], list[str]]:
    references, hypotheses = ([between.join(units) for units in side] for side in parts)
    return references, hypotheses
