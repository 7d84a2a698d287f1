"""The plan of a run whose data grows: a plan for each stretch of epochs, one after the other.

sources -> index -> plan -> generations (here) -> stream -> step -> checkpoint -> ...
With `data.extend` a run goes on with new data from an epoch on. Each state of the data is a
generation: an index, its plan, and the epoch from which it is used. `Generations` offers what a
`Plan` offers; a run whose data never changes has one generation and costs nothing more.

An epoch is finished on the plan it was begun with, and its last step is the last of that plan.
The next generation begins every group's cycle of its first epoch anew: with `data.mix`, passes
that smaller groups had begun ahead of the epoch are left there. So a cycle, in which each example
has its turn once, never mixes two states of the data, and every example, old or new, is seen in
every epoch begun since it came. Step numbers go on.

Rows count on over the generations: those of the second begin where those of the first end.
`JoinedIndex` reads them, so that nothing between plan and reader has to know of generations.
What an old generation needs (its index's folder, its data files) is opened when it is first used.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np

from raysft.data.example import Example
from raysft.data.index.table import Index
from raysft.data.names import Naming
from raysft.data.plan.plan import Cursor, Plan, PlannedStep, Summary
from raysft.errors import UserError


class Generation:
    """A state of the data, trained on from epoch `from_epoch` on; its index has `examples`."""

    def __init__(self, from_epoch: int, examples: int, make: Callable[[], Plan]) -> None:
        """make: builds the plan; called once, when it is first needed."""
        self.from_epoch = from_epoch
        self.examples = examples
        self._make = make

    @cached_property
    def plan(self) -> Plan:
        """Raises UserError where the generation's index is gone."""
        return self._make()


class Kept(Protocol):
    """What epochs came to before (`run.epochs`)."""

    def get(self, start: Cursor) -> tuple[Summary, Cursor] | None: ...

    def put(self, start: Cursor, total: Summary, after: Cursor, seconds: float) -> None: ...


class Generations:
    """What a `Plan` is to its users, over one or more generations.

    parts: the generations, oldest first. bases: the first row of each, and where the last ends.
    kept: asked before an epoch is counted, and told what it came to; None: nothing is kept.
    """

    def __init__(self, parts: Sequence[Generation]) -> None:
        """parts: oldest first; the first from epoch 0, each next one from a later epoch."""
        epochs = [part.from_epoch for part in parts]
        if not parts or epochs[0] != 0 or sorted(set(epochs)) != epochs:
            raise ValueError(f"generations begin at epochs {epochs}")
        self.parts = list(parts)
        self.bases = list(accumulate((part.examples for part in parts), initial=0))
        self._summaries: list[Summary] = []
        self._after: Cursor | None = None  # the epochs summarised
        self.kept: Kept | None = None

    @property
    def newest(self) -> Plan:
        """The plan of the newest generation."""
        return self.parts[-1].plan

    def number(self, epoch: int) -> int:
        """The generation, counted from 0, that epoch number `epoch` is trained on."""
        return bisect_right(self.parts, epoch, key=lambda part: part.from_epoch) - 1

    def start(self) -> Cursor:
        """The cursor before the first step."""
        return self.parts[0].plan.start()

    def steps(self, cursor: Cursor) -> Iterator[PlannedStep]:
        """The steps after `cursor`, from generation to generation, without end.

        Raises UserError where the cursor belongs to another plan.
        """
        owner, number = self._owner(cursor), self.number(cursor.epoch)
        if owner < number and self.parts[owner].plan.begins(cursor):
            begins = self.parts[owner + 1].from_epoch
            if cursor.epoch > begins:
                raise UserError(
                    f"this checkpoint was made in epoch {cursor.epoch - 1} on data that was to be "
                    f"trained on up to epoch {begins - 1}: from there on epochs would come again; "
                    "start the run again by its command, which decides anew where new data begins"
                )
            number, cursor = self._enter(owner + 1, cursor.step)
        return self._steps(number, self.parts[number].plan.steps(cursor))

    def next_epoch(self, cursor: Cursor) -> int:
        """The first epoch of which no step is done at `cursor`: the earliest that new data can be
        used in."""
        plan = self.parts[self._owner(cursor)].plan
        return cursor.epoch if plan.begins(cursor) else cursor.epoch + 1

    def count_steps(self, epoch: int) -> int:
        """How many steps epoch number `epoch` has, exactly. Plans all epochs up to it, once."""
        return self.summary(epoch).steps

    def summary(self, epoch: int = 0) -> Summary:
        """Totals of an epoch. Plans all epochs up to it that are not kept, once: about 1 s a
        million examples."""
        while len(self._summaries) <= epoch:
            this = len(self._summaries)
            number = self.number(this)
            after = self._after or self.start()
            if number and this == self.parts[number].from_epoch:
                after = self.parts[number].plan.start(this, after.step)
            known = self.kept.get(after) if self.kept is not None else None
            if known is None:
                begun = time.monotonic()
                known = self.parts[number].plan.summarise(this, after)
                if self.kept is not None:
                    self.kept.put(after, *known, time.monotonic() - begun)
            total, self._after = known
            self._summaries.append(total)
        return self._summaries[epoch]

    def _owner(self, cursor: Cursor) -> int:
        """The generation whose plan made a cursor. A cursor between two epochs is of the plan that
        ended the first: whether another begins the second is decided when it is begun."""
        latest = self.number(cursor.epoch)
        for number in range(latest, -1, -1):
            if self.parts[number].plan.owns(cursor):
                return number
        self.parts[latest].plan.steps(cursor)  # refuses it
        return latest

    def _steps(self, number: int, steps: Iterator[PlannedStep]) -> Iterator[PlannedStep]:
        while True:
            base = self.bases[number]
            last = number == len(self.parts) - 1
            until = None if last else self.parts[number + 1].from_epoch
            for step in steps:
                lanes = [rows + base for rows in step.lanes] if base else step.lanes
                if until is None or step.after.epoch < until:
                    yield PlannedStep(step.epoch, step.step, lanes, step.after)
                    continue
                # It may have nothing to do for some epochs: the next one has.
                yield PlannedStep(step.epoch, step.step, lanes, replace(step.after, epoch=until))
                break
            number, cursor = self._enter(number + 1, step.step)
            steps = self.parts[number].plan.steps(cursor)

    def _enter(self, number: int, step: int) -> tuple[int, Cursor]:
        """The cursor at which a generation begins, and whose: it may have nothing to do before the
        next one's turn comes."""
        cursor = self.parts[number].plan.start(self.parts[number].from_epoch, step)
        while number + 1 < len(self.parts) and cursor.epoch >= self.parts[number + 1].from_epoch:
            number += 1
            cursor = self.parts[number].plan.start(self.parts[number].from_epoch, step)
        return number, cursor


Places = Sequence[tuple[str, int, Naming | None]]
"""Of each generation's index, oldest first: folder, examples, and what they are called."""


def open_index(places: Places) -> Index | JoinedIndex:
    """What reads the rows that generations with these indexes plan."""
    if len(places) > 1:
        return JoinedIndex(places)
    folder, _, naming = places[0]
    return Index.load(folder).called(naming)


class JoinedIndex:
    """Several indexes as one, for readers of planned rows; each is opened when it is needed.

    tokens, seconds: columns, by `column[rows]`, as those of `Index`.
    """

    def __init__(self, places: Places) -> None:
        self.places = [(str(folder), int(examples), naming) for folder, examples, naming in places]
        self._bases = np.array(list(accumulate((n for _, n, _ in self.places), initial=0)))
        self._opened: dict[int, Index] = {}
        self.tokens = Column(self, "tokens")
        self.seconds = Column(self, "seconds")

    def __reduce__(self) -> tuple[type[JoinedIndex], tuple[Places]]:
        return JoinedIndex, (self.places,)

    def __len__(self) -> int:
        return int(self._bases[-1])

    def examples(self, rows: np.ndarray) -> list[Example]:
        """As `Index.examples`: the examples of `rows`, in their order."""
        found: list[Example | None] = [None] * len(rows)
        for index, places, own in self.split(rows):
            for place, example in zip(places.tolist(), index.examples(own)):
                found[place] = example
        return [example for example in found if example is not None]

    def ids(self, rows: np.ndarray) -> list[str]:
        """Ids of examples, in the order of `rows` (reads their records)."""
        return [example.id for example in self.examples(rows)]

    def source_name(self, row: int) -> str:
        """Name of the source an example is from."""
        (index, _, own), *_ = self.split(np.array([row]))
        return index.source_name(int(own[0]))

    def split(self, rows: np.ndarray) -> Iterator[tuple[Index, np.ndarray, np.ndarray]]:
        """For each index that `rows` touch: it, the places in `rows`, and its own row numbers."""
        rows = np.asarray(rows, np.int64)
        numbers = np.searchsorted(self._bases, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            yield self._index(number), places, rows[places] - self._bases[number]

    def _index(self, number: int) -> Index:
        if number not in self._opened:
            folder, examples, naming = self.places[number]
            index = Index.load(folder).called(naming)
            if len(index) != examples:
                raise UserError(
                    f"data.index_path: {folder} holds {len(index)} examples, expected {examples}: "
                    "it is not the index that this run began with; restore it"
                )
            self._opened[number] = index
        return self._opened[number]


class Column:
    """A column over all indexes."""

    def __init__(self, owner: JoinedIndex, name: str) -> None:
        self._owner, self._name = owner, name

    def __getitem__(self, rows: np.ndarray | int) -> np.ndarray:
        flat = np.atleast_1d(rows)
        found = np.zeros(len(flat), np.float32 if self._name == "seconds" else np.int32)
        for index, places, own in self._owner.split(flat):
            found[places] = getattr(index, self._name)[own]
        return found.reshape(np.shape(rows))
