"""Marks on the keys of the config: what their text is, beyond a text, and whether a run that goes
on may change them (read by `raysft.config.resume`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Literal, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class PathKey:
    """Marks a key whose text is a path: `places` makes it absolute, by the rule of raysft.paths.

    kind: file; data: a file or folder, or the URL of one in a store; model: a folder, or a hub id;
        store: a folder, or the URL of a store to write to.
    read: whether something has to be there already.
    """

    kind: Literal["file", "data", "model", "store"] = "file"
    read: bool = False


@dataclass(frozen=True)
class OneOf:
    """Marks a key that takes one name of a table, and refuses all others.

    names: of the table, which may grow: it is asked whenever a value is looked at.
    """

    names: Callable[[], Sequence[str]]

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """What pydantic checks instead of the text itself."""
        return core_schema.no_info_plain_validator_function(self._checked)

    def _checked(self, value: object) -> str:
        names = self.names()
        if isinstance(value, str) and value in names:
            return value
        near = get_close_matches(value.lower(), names, 1) if isinstance(value, str) else []
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(one_of([repr(name) for name in names]) + meant)


def one_of(texts: Sequence[str]) -> str:
    """Texts as a choice: `a, b or c`."""
    return " or ".join(part for part in (", ".join(texts[:-1]), *texts[-1:]) if part)


Rule = Literal["free", "fixed", "data", "length", "base"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Resume:
    """Marks what may become of a key when its run goes on.

    free: any start may change it: it changes nothing that a step computes, or is held against the
        run by what it names rather than by its text.
    fixed: a run keeps it.
    data: held by contents against what the run trains on (`history`); what is new there is used
        from the next epoch on, where data.extend says so.
    length: of the run: may be another where the rates of the steps so far allow it (`schedule`).
    base: may name another place, with the same weights (`run.identity`).
    weights: it decides which weights there are, so that a start with a run's weights alone
        (checkpoint.resume: weights_only) keeps it too.
    steps: of those that follow alone: a sweep may give a trial's run another one between two steps
        (sweep.scheduler: pbt), and weights, optimizer, data and ledger so far stay what they are.
    """

    rule: Rule
    weights: bool = False
    steps: bool = False


Free = Annotated[_T, Resume("free")]
Fixed = Annotated[_T, Resume("fixed")]
Stepwise = Annotated[_T, Resume("fixed", steps=True)]
Corpus = Annotated[_T, Resume("data")]
Length = Annotated[_T, Resume("length")]
Base = Annotated[_T, Resume("base", weights=True)]
Weights = Annotated[_T, Resume("fixed", weights=True)]
