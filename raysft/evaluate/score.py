"""Word and character error rate with jiwer, after a normalisation that the config names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jiwer

from raysft.evaluate.normalize import normalize, words


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
    pairs = [
        (normalize(r, steps, spelling), normalize(h, steps, spelling))
        for r, h in zip(references, hypotheses, strict=True)
    ]
    return {
        "wer": _rate(pairs, words, lambda parts: jiwer.process_words(*_joined(parts))),
        "cer": _rate(
            [(r.strip(), h.strip()) for r, h in pairs],
            list,
            lambda parts: jiwer.process_characters(*_joined(parts, "")),
        ),
    }


def _rate(
    pairs: list[tuple[str, str]],
    split: Callable[[str], list[str]],
    align: Callable[[list[list[list[str]]]], jiwer.WordOutput | jiwer.CharacterOutput],
) -> float:
    parts = [(split(r), split(h)) for r, h in pairs]
    spoken = [pair for pair in parts if pair[0]]
    inserted = sum(len(h) for r, h in parts if not r)
    if not spoken:
        return inserted / len(parts)
    output = align([[r for r, _ in spoken], [h for _, h in spoken]])
    reference = output.hits + output.substitutions + output.deletions
    errors = output.substitutions + output.deletions + output.insertions
    return (errors + inserted) / reference


def _joined(parts: list[list[list[str]]], between: str = " ") -> list[list[str]]:
    return [[between.join(units) for units in side] for side in parts]
