"""Kinds: what examples are told apart by where they are counted and drawn.

index columns -> kinds (here) -> blocks -> windows -> plan. A kind is a task; with
`data.temperature` by lang a task in a language; in order sequential, and in runs of earlier
algorithms, a group of `data.mix`. Neither is kept by example: what two columns make is made where
it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raysft.errors import UserError

MAX_LANGUAGES = 1000
"""More are no languages: of each, tables are kept (12 bytes a block)."""
_AT_ONCE = 1 << 20  # examples of a column in memory


class Languages(NamedTuple):
    """What an index says of languages. names: "" is that of examples that name none.

    column: int [N], counts in `names`; may be memory-mapped.
    """

    names: Sequence[str]
    column: np.ndarray

    def digest(self) -> str:
        """64 hex digits of which example is in which language."""
        found = hashlib.sha256(json.dumps(list(self.names)).encode())
        for at in range(0, len(self.column), _AT_ONCE):
            found.update(np.ascontiguousarray(self.column[at : at + _AT_ONCE], "<i4").data)
        return found.hexdigest()


class Paired:
    """Tasks and languages as one column of kinds, made where it is read: [rows] of int64."""

    def __init__(self, task: np.ndarray, lang: np.ndarray, kinds: np.ndarray) -> None:
        """task, lang: int [N]. kinds: int64 [tasks, languages]; -1 where no example is."""
        self._task, self._lang, self._kinds = np.asarray(task), np.asarray(lang), kinds

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self._kinds[self._task[rows], self._lang[rows]]


class Kinds(NamedTuple):
    """The kinds of an index.

    column: what `Blocks` takes as tasks. numbers: of each value of it its kind. tasks: of each
    kind the number of its task. langs: of each kind its language; none where that is not asked.
    """

    column: np.ndarray | Paired
    numbers: list[int]
    tasks: list[int]
    langs: list[str]

    def by_task(self, present: np.ndarray, tasks: int) -> np.ndarray:
        """int64 [tasks] of what is counted by the column's values, `Blocks.present`."""
        if not self.langs:
            return present
        found = np.zeros(tasks, np.int64)
        np.add.at(found, self.tasks, present)
        return found


def of_tasks(task: np.ndarray, tasks: int) -> Kinds:
    """A kind a task."""
    every = list(range(tasks))
    return Kinds(task, every, every, [])


def of_groups(task: np.ndarray, tasks: Sequence[str], groups: Sequence[str]) -> Kinds:
    """A kind a group. A task outside of them is refused later, once it is known to occur."""
    number = {name: i for i, name in enumerate(groups)}
    return Kinds(task, [number.get(name, 0) for name in tasks], [], [])


def of_languages(task: np.ndarray, tasks: int, languages: Languages) -> Kinds:
    """A kind for each task and language that some example is of, by their numbers.

    Reads both columns once. Raises UserError where no example names its language, or far too many
    are named.
    """
    names, column = list(languages.names), np.asarray(languages.column)
    if not any(names):
        raise UserError(
            "data.temperature.by: lang: no example of data.train says its language: name it in the "
            "data (`lang` of ming_jsonl), or count by source or by task"
        )
    if len(names) > MAX_LANGUAGES:
        shown = ", ".join(map(repr, [name for name in names if name][:3]))
        raise UserError(
            f"data.temperature.by: lang: the examples of data.train name {len(names):,} languages "
            f"({shown}, ...), which is more than there may be ({MAX_LANGUAGES:,}): mend the field, "
            "or count by source or by task"
        )
    counts = np.zeros(tasks * len(names), np.int64)
    for at in range(0, len(task), _AT_ONCE):
        some = slice(at, at + _AT_ONCE)
        pairs = task[some].astype(np.int64) * len(names) + column[some]
        counts += np.bincount(pairs, minlength=len(counts))
    there = np.flatnonzero(counts)
    kinds = np.full(len(counts), -1, np.int64)
    kinds[there] = np.arange(len(there))
    paired = Paired(task, column, kinds.reshape(tasks, len(names)))
    own, langs = np.divmod(there, len(names))
    every = list(range(len(there)))
    return Kinds(paired, every, own.tolist(), [names[lang] for lang in langs.tolist()])
