"""Lives of runs without Ray and torch: what the tests of kills, resizes and growing data simulate.

A `Run` keeps what a run keeps on disk: checkpoints (their cursors as JSON), generations, ledger.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raysft.config.schema import Data
from raysft.data.plan.generations import Generation, Generations
from raysft.data.plan.plan import Cursor, Plan, PlannedStep
from raysft.data.plan.verify import Report, check

TASKS = ["asr", "tts", "edit"]

Ledger = dict[tuple[int, int], tuple[int, list[str]]]


@dataclass(frozen=True)
class Corpus:
    """A state of the data: what an index would say, and a name for each example."""

    tokens: np.ndarray
    task: np.ndarray
    source: np.ndarray
    weights: tuple[float, ...]
    names: list[str]

    def plan(self, data: Data, seed: int) -> Plan:
        return Plan(
            self.tokens,
            self.task,
            TASKS,
            self.source,
            self.weights,
            "".join(self.names),
            data,
            seed,
        )

    def grown(self, rng: np.random.Generator, number: int, budget: int) -> Corpus:
        """With another source behind it, of tasks that are there already."""
        count = int(rng.integers(1, 40))
        known = np.unique(self.task[self.tokens <= budget])
        return Corpus(
            np.append(self.tokens, rng.integers(1, budget + 3, count)).astype(np.int32),
            np.append(self.task, rng.choice(known, count)).astype(np.int16),
            np.append(self.source, np.full(count, len(self.weights))).astype(np.int16),
            (*self.weights, 1.0),
            [*self.names, *(f"new{number}_{i}" for i in range(count))],
        )


@dataclass(frozen=True)
class Start:
    """One start of a run. killed: micro-batches after which it dies, counted over all workers;
    grows: the data has changed since the last start, and data.extend is set;
    resumes: plans every step from the cursor before it alone, once for all runs."""

    workers: int
    every: int
    killed: int
    grows: bool = False
    resumes: bool = False


@dataclass
class Run:
    """What a run keeps: corpora by generation, checkpoints, and its ledger."""

    data: Data
    seed: int
    corpora: list[tuple[int, Corpus]]
    saved: str | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    plans: list[tuple[Corpus, Plan]] = field(default_factory=list)
    resumed: dict[Cursor, PlannedStep] = field(default_factory=dict)

    def plan(self, corpus: Corpus) -> Plan:
        """Plans hold nothing of a run's progress: one for all starts says that too."""
        for known, plan in self.plans:
            if known is corpus:
                return plan
        self.plans.append((corpus, corpus.plan(self.data, self.seed)))
        return self.plans[-1][1]

    def generations(self) -> Generations:
        return Generations(
            [
                Generation(epoch, len(corpus.tokens), lambda c=corpus: self.plan(c))
                for epoch, corpus in self.corpora
            ]
        )

    def cursor(self) -> Cursor | None:
        return None if self.saved is None else Cursor.from_json(json.loads(self.saved))

    def extend(self, corpus: Corpus) -> None:
        """As `plans.follow` does."""
        cursor = self.cursor()
        epoch = 0 if cursor is None else self.generations().next_epoch(cursor)
        self.corpora = [part for part in self.corpora if part[0] < epoch]
        self.corpora.append((epoch, corpus))

    def go(self, start: Start, last: int) -> None:
        """Train to step `last`, or until killed."""
        generations, cursor = self.generations(), self.cursor()
        step = 0 if cursor is None else cursor.step
        self.lines = [line for line in self.lines if line["step"] <= step]
        left = start.killed
        cursor = generations.start() if cursor is None else cursor
        stream = None if start.resumes else generations.steps(cursor)
        while step < last:
            if stream is not None:
                planned = next(stream)
            else:
                if cursor not in self.resumed:
                    self.resumed[cursor] = next(generations.steps(cursor))
                planned = self.resumed[cursor]
                cursor = planned.after
            for worker in range(start.workers):
                for lane in range(worker, len(planned.lanes), start.workers):
                    if left == 0:
                        return
                    left -= 1
                    self.write(planned.epoch, planned.step, lane, planned.lanes[lane])
            step = planned.step
            if step % start.every == 0 or step == last:
                self.saved = json.dumps(planned.after.to_json())

    def write(self, epoch: int, step: int, lane: int, rows: np.ndarray) -> None:
        ids = self.names(rows)
        self.lines.append({"epoch": epoch, "step": step, "lane": lane, "ids": ids})

    def names(self, rows: np.ndarray) -> list[str]:
        names = [name for _, corpus in self.corpora for name in corpus.names]
        return [names[row] for row in rows.tolist()]

    def ledger(self) -> Ledger:
        found: Ledger = {}
        for line in self.lines:
            key = line["step"], line["lane"]
            assert key not in found, f"{key} is in the ledger twice"
            found[key] = line["epoch"], line["ids"]
        return found

    def audited(self, lines: list[dict[str, Any]] | None = None) -> Report:
        """What the audit says of it."""
        if lines is None:
            lines = sorted(self.lines, key=lambda line: line["step"])
        cursor = self.cursor()
        report = Report(self.data.lanes)
        step = 0 if cursor is None else cursor.step
        check(self.generations(), self.names, lines, set(), step, report, chunk=1)
        return report
