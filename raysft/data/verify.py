"""Holds a ledger against its plan: the core of the audit, on lines and ids wherever they are from.

plan -> generations -> stream -> step -> ledger -> verify (here). Knows no files: see audit.py.
Goes through both once, step by step; memory is that of a few thousand examples, and 2 bytes for
each in the index.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raysft.data.generations import Generations
from raysft.data.plan import PlannedStep

SHOWN = 10  # findings

Line = dict[str, Any]
"""A line of the ledger: epoch, step, lane, ids."""


@dataclass
class Report:
    """What an audit found. steps: the last that all lanes have done; findings: the first few."""

    lanes: int
    steps: int = 0
    epochs: int = 0
    examples: int = 0
    quarantined: set[str] = field(default_factory=set)
    lost: int = 0
    repeated: int = 0
    count: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.count

    def add(self, text: str, ids: Sequence[str] = ()) -> None:
        """Note a finding."""
        self.count += 1
        if len(self.findings) < SHOWN:
            more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
            self.findings.append(text + (f": {', '.join(ids[:3])}{more}" if ids else ""))

    def summary(self) -> str:
        """One line."""
        state = "clean" if self.clean else f"{self.count:,} findings"
        return (
            f"audit: {state}: {self.steps:,} steps x {self.lanes} lanes, {self.epochs} epochs, "
            f"{self.examples:,} examples, {len(self.quarantined):,} quarantined, "
            f"{self.lost:,} lost, {self.repeated:,} repeated"
        )


def check(
    generations: Generations,
    ids_of: Callable[[np.ndarray], list[str]],
    recorded: Iterable[Line],
    quarantined: Container[str],
    committed: int,
    report: Report,
    chunk: int = 4096,
) -> None:
    """Hold ledger lines, in the order of their steps, against the plan; adds to `report`.

    ids_of: ids of planned rows. committed: the step that the ledger has to reach at least.
    chunk: examples whose ids are read together.
    """
    ledger = _Ledger(iter(recorded), report)
    counts = _Counts(generations, report, ids_of)
    # lane -> the step from which it has no lines any more, and the examples planned since
    missing: dict[int, tuple[int, int]] = {}
    for step, planned in _with_ids(generations, ids_of, chunk):
        if ledger.next_step is None and step.step > committed:
            break
        lines = ledger.take(step.step)
        for lane, ids in enumerate(planned):
            where = f"step {step.step}, lane {lane}"
            line = lines.pop(lane, None)
            if line is None:
                if step.step <= committed:
                    report.lost += len(ids)
                    report.add(f"{where}: is not in the ledger", ids)
                else:
                    first, count = missing.get(lane, (step.step, 0))
                    missing[lane] = (first, count + len(ids))
                continue
            if lane in missing:  # the lane went on: what it left out was not the end
                first, count = missing.pop(lane)
                report.lost += count
                report.add(f"step {first}, lane {lane}: is not in the ledger, step {step.step} is")
            if line["epoch"] != step.epoch:
                report.add(f"{where}: recorded in epoch {line['epoch']}, planned in {step.epoch}")
            _compare(where, ids, line["ids"], quarantined, report)
        for lane, line in lines.items():
            report.repeated += len(line["ids"])
            report.add(f"step {step.step}, lane {lane}: there is no such lane", line["ids"])
        counts.add(step)
        if not missing:
            report.steps = step.step
            report.epochs = step.epoch + 1


def _compare(
    where: str, planned: list[str], trained: list[str], quarantined: Container[str], report: Report
) -> None:
    report.examples += len(trained)
    if trained == planned:
        return
    left_out = list((Counter(planned) - Counter(trained)).elements())
    report.quarantined.update(name for name in left_out if name in quarantined)
    if lost := [name for name in left_out if name not in quarantined]:
        report.lost += len(lost)
        report.add(f"{where}: planned, not trained on, not quarantined", lost)
    if extra := list((Counter(trained) - Counter(planned)).elements()):
        report.repeated += len(extra)
        report.add(f"{where}: trained on, not planned here", extra)
    rest = iter(planned)
    if not lost and not extra and not all(name in rest for name in trained):
        report.add(f"{where}: in another order than planned", trained)


class _Ledger:
    """Lines by step."""

    def __init__(self, lines: Iterator[Line], report: Report) -> None:
        self._lines, self._report = lines, report
        self._next = next(lines, None)

    @property
    def next_step(self) -> int | None:
        """The step of the next line; None at the end."""
        return self._next["step"] if self._next is not None else None

    def take(self, step: int) -> dict[int, Line]:
        """The lines of `step` by lane. Notes those that are there again, or come too late."""
        found: dict[int, Line] = {}
        while self._next is not None and self._next["step"] <= step:
            line, self._next = self._next, next(self._lines, None)
            if line["step"] < step or line["lane"] in found:
                self._report.repeated += len(line["ids"])
                where = f"step {line['step']}, lane {line['lane']}"
                self._report.add(f"{where}: recorded again or out of order", line["ids"])
            else:
                found[line["lane"]] = line
        return found


class _Counts:
    """How often each row is planned in the epoch under way: the plan itself may not lose any."""

    def __init__(
        self,
        generations: Generations,
        report: Report,
        ids_of: Callable[[np.ndarray], list[str]],
    ) -> None:
        self._generations, self._report, self._ids_of = generations, report, ids_of
        self._epoch, self._seen = -1, np.zeros(0, np.uint16)

    def add(self, step: PlannedStep) -> None:
        """Count a step's rows; at the end of an epoch, look for those left out or repeated."""
        if step.epoch != self._epoch:
            self._epoch = step.epoch
            self._number = self._generations.number(step.epoch)
            self._base = self._generations.bases[self._number]
            self._seen = np.zeros(self._generations.parts[self._number].examples, np.uint16)
        np.add.at(self._seen, np.concatenate(step.lanes) - self._base, 1)
        plan = self._generations.parts[self._number].plan
        if step.after.epoch == step.epoch or plan.settings["mix"]:
            return
        weights = np.array(plan.settings["weights"])[plan.source]
        fits = np.ones(len(weights), bool)
        fits[plan.oversize] = False
        for what, wrong in (
            ("left out of", fits & (self._seen < np.floor(weights))),
            ("too often in", (self._seen > np.ceil(weights)) | (~fits & (self._seen > 0))),
        ):
            if rows := np.flatnonzero(wrong).tolist():
                count = "lost" if what.startswith("left") else "repeated"
                setattr(self._report, count, getattr(self._report, count) + len(rows))
                names = self._ids_of(np.array(rows[:3]) + self._base)
                names += ["..."] * (len(rows) - len(names))
                self._report.add(f"epoch {step.epoch}: {what} the plan", names)


def _with_ids(
    generations: Generations, ids_of: Callable[[np.ndarray], list[str]], size: int
) -> Iterator[tuple[PlannedStep, list[list[str]]]]:
    """All planned steps with the ids of each lane, read some thousand at a time."""
    steps = generations.steps(generations.start())
    while True:
        chunk: list[PlannedStep] = []
        rows: list[np.ndarray] = []
        while sum(map(len, rows)) < size:
            chunk.append(next(steps))
            rows.append(np.concatenate(chunk[-1].lanes))
        names = iter(ids_of(np.concatenate(rows)))
        for step in chunk:
            yield step, [[next(names) for _ in lane] for lane in step.lanes]
