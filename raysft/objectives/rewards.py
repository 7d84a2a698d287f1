"""The rewards there are: what an answer earns, of its text and the facts of its example alone."""

from __future__ import annotations

import re

from raysft.data.facts import Facts

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.S)
_WHOLE = re.compile(r"-?\d+")


def accuracy(answer: str, facts: Facts) -> float:
    """1 where the answer says what the right one does, else 0; 0 where there is no right one."""
    if facts.text is None:
        return 0.0
    said, right = tagged(answer), tagged(facts.text)
    if said is None and right is None:
        said, right = answer.strip(), facts.text.strip()
    if said is None or right is None:
        return 0.0
    return float(said == right or _same_number(said, right))


def form(answer: str, facts: Facts) -> float:
    """1 where the answer is one in tags and nothing else, else 0."""
    return float(re.fullmatch(_TAGGED, answer.strip()) is not None)


def rating(answer: str, facts: Facts) -> float:
    """Minus the distance of the rating in the answer from the raters' mean; without a rating minus
    the length of the scale, so that none earns more than the worst. Of an answer that rates several
    dimensions: the mean of that over those that were asked about."""
    said = tagged(answer)
    if facts.parts:
        earned = [
            _near(_behind(said or "", part.label), part.rated, part.highest - part.lowest)
            for part in facts.parts
        ]
        return sum(earned) / len(earned)
    mean = facts.rated
    return 0.0 if mean is None else _near(said or "", mean, facts.highest - facts.lowest)


def _near(said: str, mean: float, longest: int) -> float:
    """Of the first whole number that is said."""
    number = _WHOLE.search(said)
    return -float(longest) if number is None else -min(longest, abs(float(number[0]) - mean))


def _behind(said: str, label: str) -> str:
    """What is said behind the first [label], up to the next bracket; "": it is not there."""
    return said.partition(f"[{label}]")[2].partition("[")[0]


def tagged(text: str) -> str | None:
    """What stands in the first <answer> of a text; None: it has none."""
    match = _TAGGED.search(text)
    return None if match is None else match[1].strip()


def _same_number(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return False
