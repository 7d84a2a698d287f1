"""One logger and its thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raysft.failures import told
from raysft.json_types import JsonObject
from raysft.run.lines import read_lines

Step = tuple[int, bool]  # of an evaluation, and whether it is that of all data at the end
SHOWN = ("continued", "stopped", "failed", "skipped", "warning", "length", "finished")
AT_ONCE = 200  # lines of metrics.jsonl


@dataclass(frozen=True)
class Known:
    """What a logger has: the last step of metrics.jsonl, and the last evaluation."""

    step: int = -1
    evaluation: Step = (-1, False)


class Sink(Protocol):
    """A logger. Whatever any of this raises ends it, and nothing else."""

    name: str

    def open(self) -> Known:
        """Begin, or go on; says what it has."""
        ...

    def metrics(self, lines: Sequence[JsonObject]) -> None:
        """Lines of metrics.jsonl, in order."""
        ...

    def evaluation(self, line: JsonObject) -> None:
        """A line of eval.jsonl."""
        ...

    def event(self, line: JsonObject) -> None:
        """A line of events.jsonl that people want to know of."""
        ...

    def close(self, outcome: str) -> None:
        """Nothing more will come; outcome: finished, stopped or failed."""
        ...


class Sender:
    """Gives a logger, in a thread, the lines that it has not got yet."""

    def __init__(
        self,
        sink: Sink,
        folder: Path,
        step: int,
        evaluations: Sequence[JsonObject],
        permit: Callable[[], None] = lambda: None,
    ) -> None:
        """folder: of the run, which goes on after `step`: what its files say until then is given
        where the logger has not got it; evaluations: the lines of its eval.jsonl until then;
        permit: raises where this process owns the run no longer."""
        self._sink, self._folder, self._step = sink, folder, step
        self._evaluations, self._permit = evaluations, permit
        self._queue: queue.SimpleQueue[tuple[str, JsonObject]] = queue.SimpleQueue()
        self._failed = threading.Event()
        self._failure: str | None = None
        self._known = Known()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"to {sink.name}", daemon=True)
        self._thread.start()

    def put(self, kind: str, line: JsonObject) -> None:
        """A line of metrics, eval or events was written."""
        if not self._failed.is_set() and (kind != "events" or line["event"] in SHOWN):
            self._queue.put((kind, line))

    def finish(self, outcome: str) -> None:
        """Nothing more will be put."""
        self._queue.put(("end", {"outcome": outcome}))

    def join(self, seconds: float) -> None:
        """Wait so long, at most, for the logger to take all."""
        self._thread.join(seconds)
        if self._thread.is_alive() and not self._failed.is_set():
            self._fail(f"has not taken all within {seconds:.0f} s at the end; the rest is left out")

    def failure(self) -> str | None:
        """Why it failed, once."""
        said, self._failure = self._failure, None
        return said

    def _fail(self, what: str) -> None:
        self._failure = f"{self._sink.name} {what}"
        self._failed.set()

    def _run(self) -> None:
        try:
            self._known = self._sink.open()
            self._before()
            while not self._ended:
                self._take(self._waiting())
        except BaseException as error:  # noqa: BLE001 - whatever it is: training goes on
            if not self._failed.is_set():
                self._fail(f"has failed, the run goes on without it: {_line(error)}")
            while not self._queue.empty():
                self._queue.get()

    def _waiting(self) -> list[tuple[str, JsonObject]]:
        """What there is, at least one."""
        found = [self._queue.get()]
        while not self._queue.empty() and len(found) < AT_ONCE:
            found.append(self._queue.get())
        return found

    def _before(self) -> None:
        """What the run's files say, up to the step that it goes on from."""
        known = self._known
        items = [("eval", line) for line in self._evaluations if evaluated(line) > known.evaluation]
        if known.step < self._step:
            lines = read_lines(self._folder / "metrics.jsonl", {"step": int})
            items += [("metrics", line) for line in lines if line["step"] <= self._step]
        self._take(sorted(items, key=lambda item: item[1]["step"]))

    def _take(self, items: Sequence[tuple[str, JsonObject]]) -> None:
        for kind, lines in _runs(items):
            self._permit()
            if kind == "metrics":
                new = [line for line in lines if line["step"] > self._known.step]
                for first in range(0, len(new), AT_ONCE):
                    self._sink.metrics(new[first : first + AT_ONCE])
                continue
            for line in lines:
                if kind == "eval" and not self._again(line):
                    self._sink.evaluation(line)
                elif kind == "events":
                    self._sink.event(line)
                elif kind == "end":
                    self._sink.close(str(line["outcome"]))
                    self._ended = True

    def _again(self, line: JsonObject) -> bool:
        """Whether an evaluation was given before a kill, at a step that is trained again. Another
        one of a step that is not, is one of something else."""
        return line["step"] > self._step and evaluated(line) <= self._known.evaluation


def evaluated(line: JsonObject) -> Step:
    """Which evaluation a line of eval.jsonl is of."""
    return line["step"], bool(line.get("final"))


def _runs(items: Sequence[tuple[str, JsonObject]]) -> Iterator[tuple[str, list[JsonObject]]]:
    """Lines of one kind that follow each other."""
    lines: list[JsonObject] = []
    for place, (kind, line) in enumerate(items):
        lines.append(line)
        if place + 1 == len(items) or items[place + 1][0] != kind:
            yield kind, lines
            lines = []


def _line(error: BaseException) -> str:
    text = " ".join(told(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
