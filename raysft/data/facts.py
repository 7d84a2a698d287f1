"""What a reward is told of an example: carried beside its tokens as an array of bytes.

The encoder adds it where answers are rewarded (`Encoder.facts`); index, stream and feed carry it
without knowing it, as all arrays.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace

import numpy as np

from raysft.data.example import Example
from raysft.scorers.rated import Rated

FACTS = "facts"
"""The array of a sequence that holds them."""
_NUMBER = re.compile(r"\s*(?:<answer>)?\s*(-?\d+)\s*(?:</answer>)?\s*")


@dataclass(frozen=True)
class Part:
    """One dimension of an answer that rates several, each behind its [label]. ratings: of raters,
    one or more. lowest, highest: of their scale."""

    label: str
    ratings: tuple[float, ...]
    lowest: int = 1
    highest: int = 5

    @property
    def rated(self) -> float:
        """The mean of the ratings."""
        return sum(self.ratings) / len(self.ratings)


@dataclass(frozen=True)
class Facts:
    """What is known of an example that was answered.

    text: the right answer; None: it has none. ratings: what raters said, for answers that are
    ratings; (): nobody did. lowest, highest: of their scale. parts: of an answer that rates
    several dimensions, those that are asked about; (): it rates one, or none.
    """

    id: str
    task: str
    text: str | None = None
    ratings: tuple[float, ...] = ()
    lowest: int = 1
    highest: int = 5
    parts: tuple[Part, ...] = ()

    @property
    def rated(self) -> float | None:
        """The mean of the ratings; where there are none, the right answer if that is one."""
        if self.ratings:
            return sum(self.ratings) / len(self.ratings)
        match = _NUMBER.fullmatch((self.text or "").rpartition("</think>")[2])
        return None if match is None else float(match[1])

    def packed(self) -> np.ndarray:
        """uint8 [bytes]."""
        return np.frombuffer(json.dumps(asdict(self)).encode(), np.uint8)

    @classmethod
    def unpacked(cls, array: np.ndarray) -> Facts:
        """The inverse of `packed`."""
        tree = json.loads(array.tobytes())
        parts = [Part(**{**part, "ratings": tuple(part["ratings"])}) for part in tree["parts"]]
        return cls(**{**tree, "ratings": tuple(tree["ratings"]), "parts": tuple(parts)})


def facts_of(example: Example, form: Example) -> Facts:
    """Of the form that an example has at a step."""
    found = Facts(example.id, example.task, reference_of(form))
    rated = _rated(example, form)
    if any(one.label for one in rated):
        parts = (Part(one.label, _given(one), one.lowest, one.highest) for one in rated)
        return replace(found, parts=tuple(parts))
    if len(rated) != 1:
        return found
    (one,) = rated
    return replace(found, ratings=_given(one), lowest=one.lowest, highest=one.highest)


def _given(rated: Rated) -> tuple[float, ...]:
    return tuple(map(float, rated.ratings))


def _rated(example: Example, form: Example) -> list[Rated]:
    """What raters said of the dimensions that a form asks about."""
    judged = example.judged
    if judged is None:
        return list(form.rated)
    if judged.header is not None:  # its answer names them: a rater may have left some out
        answer = (form.text or "").rpartition("<answer>")[2]
        return [one.rated for one in judged.dimensions if f"[{one.label}]" in answer]
    asked = (form.instruction or "").removeprefix(judged.before).removesuffix(judged.after)
    found = (one.rated for one in judged.dimensions if asked in one.wordings)
    return list(found)[:1]


def reference_of(example: Example) -> str | None:
    """The text that an answer is compared with: the example's own `text`, else what is to be
    answered; None where a part of that is no text."""
    if any(not isinstance(part, str) for part in example.output):
        return None
    if example.text is None and example.output:
        return "".join(str(part) for part in example.output)
    return example.text
