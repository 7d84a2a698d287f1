"""Word and character error rate with jiwer, after a normalisation that the config names."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import jiwer


def normalize(text: str, steps: Sequence[str]) -> str:
    """Apply `lower`, `punctuation` (every Unicode P* and S* character but the apostrophe inside a
    word becomes a space) and `whitespace` (runs become one space, ends are trimmed), in this order.
    """
    if "lower" in steps:
        text = text.lower()
    if "punctuation" in steps:
        text = "".join(
            " " if unicodedata.category(c)[0] in "PS" and not _inner_apostrophe(text, i) else c
            for i, c in enumerate(text)
        )
    if "whitespace" in steps:
        text = " ".join(text.split())
    return text


def _inner_apostrophe(text: str, i: int) -> bool:
    inside = 0 < i < len(text) - 1
    return text[i] in "'’" and inside and text[i - 1].isalnum() and text[i + 1].isalnum()


def error_rates(
    references: Sequence[str], hypotheses: Sequence[str], steps: Sequence[str]
) -> dict[str, float]:
    """{"wer", "cer"} over all pairs: errors summed, divided by the reference's words / characters.

    A reference that is empty after normalisation counts every hypothesis word as an insertion.
    Raises ValueError where all references are empty: there is nothing to divide by.
    """
    pairs = [(normalize(r, steps), normalize(h, steps)) for r, h in zip(references, hypotheses)]
    spoken = [(r, h) for r, h in pairs if r]
    silent = [h for r, h in pairs if not r]
    if not spoken:
        raise ValueError("every reference is empty after normalisation")
    words = jiwer.process_words([r for r, _ in spoken], [h for _, h in spoken])
    characters = jiwer.process_characters([r for r, _ in spoken], [h for _, h in spoken])
    return {
        "wer": _rate(words, sum(len(h.split()) for h in silent)),
        "cer": _rate(characters, sum(len(h) for h in silent)),
    }


def _rate(output: jiwer.WordOutput | jiwer.CharacterOutput, inserted: int) -> float:
    reference = output.hits + output.substitutions + output.deletions
    errors = output.substitutions + output.deletions + output.insertions
    return (errors + inserted) / reference
