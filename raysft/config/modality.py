"""`model.moe.modality`: which kinds of tokens there are, and which experts each may go to.

What the keys say alone is read and checked here; what it means for a model, in `models.modality`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pydantic import Field

from raysft.config.marks import Weights
from raysft.config.section import Section
from raysft.errors import Mistake
from raysft.json_types import Json, JsonObject

KEY = "model.moe.modality"
GROUPS = f"{KEY}.groups"
_KEYS = ("ids", "experts", "top_k")
_WORDS = ("audio", "rest")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")

_Start = Weights[Literal["one_router"] | None]
Span = tuple[int, int]
"""First and last of a range."""


class Modality(Section):
    """Kinds of tokens, and the experts that each of them may go to; left out: any expert."""

    groups: Weights[dict[str, JsonObject]] = Field(
        min_length=1,
        description="kinds of tokens by name, such as {text: {ids: 0-100001, experts: 0-31}, "
        "audio: {ids: 100002-100503, experts: 32-63}}. ids: a range, a list of them, `audio` (the "
        "positions of clips in a model that hears) or `rest`; experts: a range or a list; top_k: "
        "experts of each of its tokens, at most the model's own number, which is the default",
    )
    softmax: Weights[Literal["group", "all"]] = Field(
        "group",
        description="what a token's scores are shares of; group: the experts of its kind; all: all "
        "experts, those of other kinds then masked (MoST)",
    )
    renormalize: Weights[bool | None] = Field(
        None,
        description="the weights of a token's experts are made to sum to 1; default: as the model "
        "has it",
    )
    # `from` is no name in Python; in the config it says from what the routers of the kinds start.
    __annotations__["from"] = _Start
    vars()["from"] = Field(
        None,
        description="one_router: each kind has a router of its own, which starts as a copy of the "
        "model's (Ming); experts may then be left out: all. Default: the model's one router",
    )

    @property
    def several(self) -> bool:
        """Whether each kind has a router of its own."""
        return getattr(self, "from") is not None


@dataclass(frozen=True)
class Group:
    """A kind of token. ids: spans of token ids, or what they are of a model; experts: in order;
    None: all; top_k: experts of each token; None: the model's number."""

    name: str
    ids: tuple[Span, ...] | Literal["audio", "rest"]
    experts: tuple[int, ...] | None
    top_k: int | None

    @property
    def key(self) -> str:
        """Where it is in the config."""
        return f"{GROUPS}.{self.name}"


class _Wrong(Exception):
    """A mistake on the way."""


def read_groups(modality: Modality) -> tuple[list[Group], list[Mistake]]:
    """The groups, in order, and what is wrong with them: then not all are there."""
    found, wrong = [], []
    for name, given in modality.groups.items():
        try:
            found.append(_group(name, given, modality.several))
        except _Wrong as error:
            key, why = error.args
            wrong.append(Mistake.of(key, why))
    if not wrong:
        wrong = _together(found)
    return found, wrong


def _group(name: str, given: JsonObject, several: bool) -> Group:
    key = f"{GROUPS}.{name}"
    if not re.fullmatch(r"\w+", name):
        raise _Wrong(GROUPS, f"{name!r} is no name of a kind: letters, digits and _, such as text")
    for other in given:
        if other not in _KEYS:
            raise _Wrong(f"{key}.{other}", f"unknown key; there are {', '.join(_KEYS)}")
    if given.get("ids") is None:
        raise _Wrong(f"{key}.ids", "missing: a range of token ids (0-99), audio, or rest")
    ids = given["ids"]
    spans = ids if ids in _WORDS else tuple(_spans(f"{key}.ids", ids, ", audio, or rest"))
    experts = None
    if given.get("experts") is not None:
        ranges = _spans(f"{key}.experts", given["experts"], "")
        experts = tuple(i for first, last in ranges for i in range(first, last + 1))
        if len(set(experts)) < len(experts):
            raise _Wrong(f"{key}.experts", f"{given['experts']} names an expert twice")
    elif not several:
        raise _Wrong(f"{key}.experts", "missing: which experts its tokens may go to, such as 0-31")
    top_k = given.get("top_k")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise _Wrong(f"{key}.top_k", f"expected a whole number of at least 1, found {top_k!r}")
    return Group(name, spans, experts, top_k)


def _spans(key: str, given: Json, more: str) -> Iterable[Span]:
    for part in given if isinstance(given, list) else [given]:
        text = str(part) if type(part) is int else part
        match = _RANGE.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise _Wrong(
                key,
                f"expected a range such as 0-31, a number, a list of them{more}, found {part!r}",
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise _Wrong(key, f"{text} ends before it begins")
        yield first, last


def _together(groups: Sequence[Group]) -> list[Mistake]:
    """What is wrong between groups."""
    found = []
    for word in _WORDS:
        own = [group for group in groups if group.ids == word]
        if len(own) > 1:
            why = f"{word} is that of {own[0].name} already"
            found.append(Mistake.of(f"{own[1].key}.ids", why))
    spans = [(span, g) for g in groups if not isinstance(g.ids, str) for span in g.ids]
    spans.sort(key=lambda each: each[0])
    for (one, of), (other, whose) in pairwise(spans):
        if other[0] <= one[1]:
            shared = (other[0], min(one[1], other[1]))
            where = "twice" if of is whose else f"in {of.name} too: a token is of one kind"
            found.append(Mistake.of(f"{whose.key}.ids", f"{said([shared])} is {where}"))
    given = [group for group in groups if group.experts is not None]
    if given and len(given) < len(groups):
        lacks = next(group for group in groups if group.experts is None)
        why = "missing: either every kind names its experts, or none does and all have all"
        found.append(Mistake.of(f"{lacks.key}.experts", why))
    owner: dict[int, Group] = {}
    for group in given:
        both = sorted({i for i in group.experts or () if i in owner})
        if both:
            why = f"{said(spans_of(both))} overlaps those of {owner[both[0]].name}"
            found.append(Mistake.of(f"{group.key}.experts", why))
        owner |= dict.fromkeys(group.experts or (), group)
    return found


def spans_of(numbers: Iterable[int]) -> list[Span]:
    """Numbers in ascending order as ranges."""
    found: list[Span] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def said(spans: Sequence[Span]) -> str:
    """Ranges as the config has them, the first few."""
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans[:5]]
    return ", ".join(texts) + (", ..." if len(spans) > 5 else "")
