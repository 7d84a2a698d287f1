"""Holds a ledger against its plan: the core of the audit, on lines and ids wherever they are from.

plan -> generations -> stream -> step -> ledger -> verify (here). Knows no files: see audit.py.
Goes through both once, step by step; memory is that of a few thousand examples, and 2 bytes for
each in the index.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from raysft.data.plan.generations import Generations
from raysft.data.plan.plan import PlannedStep
from raysft.json_types import JsonObject

SHOWN = 10  # findings
_AT_ONCE = 1 << 20  # examples

Line = JsonObject
"""A line of the ledger: epoch, step, lane, ids; of newer runs also quarantined, tensors, chain."""


@dataclass
class Report:
    """What an audit found. steps: the last that all lanes have done; findings: the first few.

    reread: batches that were read again; None: none were to be. notes: what is no fault of a run.
    """

    lanes: int
    steps: int = 0
    epochs: int = 0
    examples: int = 0
    quarantined: set[str] = field(default_factory=set)
    lost: int = 0
    repeated: int = 0
    count: int = 0
    findings: list[str] = field(default_factory=list)
    reread: int | None = None
    notes: list[str] = field(default_factory=list)

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
            + ("" if self.reread is None else f", {self.reread:,} batches read again")
        )


def check(
    generations: Generations,
    ids_of: Callable[[np.ndarray], list[str]],
    recorded: Iterable[Line],
    quarantined: Container[str],
    committed: int,
    report: Report,
    chunk: int = 4096,
    follow: Callable[[Line], str | None] = lambda line: None,
    seen: Callable[[PlannedStep, int, list[str], Line], None] = lambda *_: None,
) -> None:
    """Hold ledger lines, in the order of their steps, against the plan; adds to `report`.

    ids_of: ids of planned rows. quarantined: those that quarantine.jsonl names.
    committed: the step that the ledger has to reach at least.
    chunk: examples whose ids are read together. follow: told of every line in turn, says why it
    is not the one that was written after its lane's line before (`run.ledger.Chains`). seen: given
    every planned (step, lane) that is recorded, the ids planned and the line.
    """
    ledger = _Ledger(iter(recorded), report, follow)
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
            _compare(where, ids, line, quarantined, report)
            seen(step, lane, ids, line)
        for lane, line in lines.items():
            report.repeated += len(line["ids"])
            report.add(f"step {step.step}, lane {lane}: there is no such lane", line["ids"])
        while ledger.broken:  # after what is wrong with the ids themselves
            report.add(ledger.broken.pop(min(ledger.broken)))
        counts.add(step)
        if not missing:
            report.steps = step.step
            report.epochs = step.epoch + 1


def _compare(
    where: str, planned: list[str], line: Line, quarantined: Container[str], report: Report
) -> None:
    trained: list[str] = line["ids"]
    report.examples += len(trained)
    if trained == planned and not line.get("quarantined"):
        return
    left_out = list((Counter(planned) - Counter(trained)).elements())
    # Lines from before they said so themselves: whatever quarantine.jsonl names may be missing.
    own: list[str] = line.get("quarantined", [name for name in left_out if name in quarantined])
    report.quarantined.update(own)
    if unnamed := [name for name in own if name not in quarantined]:
        report.add(f"{where}: quarantined, and quarantine.jsonl does not say why", unnamed)
    if lost := list((Counter(left_out) - Counter(own)).elements()):
        report.lost += len(lost)
        report.add(f"{where}: planned, not trained on, not quarantined", lost)
    if foreign := list((Counter(own) - Counter(left_out)).elements()):
        report.add(f"{where}: quarantined, not planned here or trained on", foreign)
    if extra := list((Counter(trained) - Counter(planned)).elements()):
        report.repeated += len(extra)
        report.add(f"{where}: trained on, not planned here", extra)
    for names in (trained, own) if not lost and not extra else ():
        rest = iter(planned)
        if not all(name in rest for name in names):
            report.add(f"{where}: in another order than planned", names)


class _Ledger:
    """Lines by step."""

    def __init__(
        self, lines: Iterator[Line], report: Report, follow: Callable[[Line], str | None]
    ) -> None:
        self._lines, self._report, self._follow = lines, report, follow
        self.broken: dict[int, str] = {}  # lanes of the lines taken that `follow` objects to
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
            if broken := self._follow(line):
                self.broken[line["lane"]] = f"step {line['step']}, lane {line['lane']}: {broken}"
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
        fits = np.ones(len(self._seen), bool)
        fits[plan.oversize] = False
        wrongs: dict[str, list[int]] = {"left out of": [], "too often in": []}
        for at in range(0, len(fits), _AT_ONCE):
            some = slice(at, at + _AT_ONCE)
            passes, seen, may = plan.passes(some), self._seen[some], fits[some]
            wrongs["left out of"] += (np.flatnonzero(may & (seen < np.floor(passes))) + at).tolist()
            often = (seen > np.ceil(passes)) | (~may & (seen > 0))
            wrongs["too often in"] += (np.flatnonzero(often) + at).tolist()
        for what, rows in wrongs.items():
            if rows:
                count = "lost" if what.startswith("left") else "repeated"
                setattr(self._report, count, getattr(self._report, count) + len(rows))
                names = self._ids_of(np.array(rows[:3]) + self._base)
                names += ["..."] * (len(rows) - len(names))
                self._report.add(f"epoch {step.epoch}: {what} the plan", names)


def _with_ids(
    generations: Generations, ids_of: Callable[[np.ndarray], list[str]], size: int
) -> Iterator[tuple[PlannedStep, list[list[str]]]]:
    """All planned steps with the ids of each lane, read `size` examples at a time; fewer at first,
    for a ledger may be short."""
    steps = generations.steps(generations.start())
    at_once = min(size, 128)
    while True:
        chunk: list[PlannedStep] = []
        rows: list[np.ndarray] = []
        at_once, now = min(size, 2 * at_once), at_once
        while sum(map(len, rows)) < now:
            chunk.append(next(steps))
            rows.append(np.concatenate(chunk[-1].lanes))
        names = iter(ids_of(np.concatenate(rows)))
        for step in chunk:
            yield step, [[next(names) for _ in lane] for lane in step.lanes]
