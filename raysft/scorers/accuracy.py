"""The share of answers that are their references once `evaluate.normalize` has made both
comparable: a class said with a capital or a full stop is that class."""

from __future__ import annotations

from raysft.scorers.base import Settings, share_of_right
from raysft.scorers.normalize import normalize


def _same(answer: str, reference: str, settings: Settings) -> bool:
    def shown(text: str) -> str:
        return normalize(text, settings.normalize, settings.spelling).strip()

    return shown(answer) == shown(reference)


SCORER = share_of_right("accuracy", "accuracy", ("classification",), _same)
