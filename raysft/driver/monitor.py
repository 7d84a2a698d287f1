"""What driver and workers of a run tell each other, and who decides about restarts.

One object a submission, living in a process of its own (`launch` makes it a Ray actor): it outlives
worker groups, so it is where failures are counted. Knows nothing of Ray.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from raysft.json_types import JsonObject
from raysft.run.signals import LEAVE, SAVE

if TYPE_CHECKING:
    from raysft.run.evaluations import Made

LONGEST_BACKOFF_S = 60.0


class Monitor:
    """Progress to the driver; signals to the workers; the failure budget."""

    def __init__(
        self, max_failures: int, backoff_s: float, saved: int = -1, training: bool = True
    ) -> None:
        """max_failures: without a new checkpoint in between; -1: any number. saved: step of the
        checkpoint that this submission goes on from; -1: there is none. training: False: it
        evaluates."""
        self._training = training
        self._max, self._backoff = max_failures, backoff_s
        self._lines: list[JsonObject] = []
        self._mistake: str | None = None
        self._details = ""
        self._seen: dict[str, int] = {}  # failures that may be certain -> the start they came in
        self._signal = 0
        self._starts = 0
        self._workers: int | None = None
        self._reasons: list[str] = []  # of what ended the group that runs or ran
        self._failures = 0  # since the last new checkpoint
        self._saved = saved  # step of the newest checkpoint known here
        self._new = False  # whether this submission has written it
        self._saves = 0
        self._made: dict[int, Made] = {}  # beside training, and not recorded yet
        self._tried: set[int] = set()  # steps evaluated beside training, or given up
        self._trying: int | None = None
        self._alone = False  # nothing more is to be evaluated beside training
        self._over = False  # nor is

    def report(self, line: JsonObject) -> None:
        """Called by rank 0: something to show. A new checkpoint renews the failure budget."""
        self._saves += line.get("event") == "saved"
        if line.get("event") == "saved" and line["step"] > self._saved:
            self._saved, self._failures, self._new = line["step"], 0, True
            self._seen.clear()
        self._lines.append({"at": time.time(), **line})

    def take(self) -> list[JsonObject]:
        """What was reported since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def mistake(self, message: str, details: str = "") -> None:
        """Remember the first mistake that no restart mends. details: its traceback.

        One that comes after another worker of the group has failed may only follow from that, while
        the group is taken down: if it does not, it comes again.
        """
        if self._mistake is None and not self._reasons:
            self._mistake, self._details = message, details

    def again(self, name: str) -> bool:
        """Whether a failure of this name ended an earlier start, and no checkpoint came since."""
        return self._seen.setdefault(name, self._starts) < self._starts

    def details(self) -> str:
        """The traceback of the mistake, where it has one."""
        return self._details

    def ended(self) -> str | None:
        """The message the run ends with: workers that are started again stop at once."""
        return self._mistake

    def signal(self) -> int:
        """What rank 0 should do: SAVE, LEAVE or 0 (go on)."""
        signal = self._signal
        if signal == SAVE:
            self._signal = 0
        return signal

    def tell(self, signal: int) -> None:
        """Send a signal. Leaving cannot be taken back."""
        self._signal = max(signal, self._signal)

    def leave(self) -> bool:
        """Tell the workers to leave; returns whether any have begun: if not, nothing is to save."""
        self.tell(LEAVE)
        if not self._training:  # they have nothing to save: see `entry.Unwanted`
            self._mistake = self._mistake or "the evaluation was ended before it was done"
        return self._starts > 0

    def made(self, one: Made) -> None:
        """Called by who evaluates beside training: for rank 0 of training to record."""
        self._made[one.step] = one
        self._tried.add(one.step)
        self._trying = None

    def unrecorded(self) -> list[Made]:
        """What is to be recorded, lowest step first."""
        return [self._made[step] for step in sorted(self._made)]

    def recorded(self, step: int) -> None:
        """What was made of `step` is in the run's files, or of no use to them."""
        self._made.pop(step, None)

    def tried(self) -> set[int]:
        """Steps that were evaluated beside training by this submission, or given up."""
        return self._tried

    def trying(self, step: int) -> None:
        """Called by who evaluates beside training, before it does."""
        self._trying = step

    def tried_last(self) -> int | None:
        """The step that is being evaluated beside training, or was when that ended."""
        return self._trying

    def saves(self) -> int:
        """How often a checkpoint was written: a reason to look for one to evaluate."""
        return self._saves

    def alone(self) -> None:
        """Called by rank 0 of training at its end: it does what is left of evaluations itself."""
        self._alone = True

    def wanted(self) -> bool:
        """Whether evaluations beside training are still of use."""
        return not self._alone and self._signal != LEAVE and self._mistake is None

    def over(self) -> None:
        """Called by the driver: nothing is evaluated beside training any more."""
        self._over = True

    def is_over(self) -> bool:
        """Whether that is so."""
        return self._over

    def failed(self, reason: str, first: bool = False) -> None:
        """A worker failed, or ended itself. `first`: this is the cause, others follow from it."""
        if first:
            self._reasons.insert(0, reason)
        else:
            self._reasons.append(reason)

    def enter(self, workers: int) -> tuple[int, JsonObject]:
        """`begin`, with the number of the group, counted from 1."""
        told = self.begin(workers)
        return self._starts, told

    def begin(self, workers: int) -> JsonObject:
        """Called by rank 0 of each worker group when it starts: what ended the one before, and how
        long to pause. {"end": message} where the failure budget is used up."""
        self._starts += 1
        before, self._workers = self._workers, workers
        reasons, self._reasons = self._reasons, []
        if self._starts == 1:
            return {}
        if not reasons:  # Ray ended the group to make one of another size
            if before == workers:
                return {"reason": "Ray started the workers again"}
            return {"reason": f"resized from {before} to {workers} workers"}
        self._failures += 1
        if 0 <= self._max < self._failures:
            since = f"since the checkpoint of step {self._saved}" if self._new else "so far"
            work = "training" if self._training else "evaluation"
            goes_on = "continues from the last checkpoint"
            if not self._training:
                goes_on = "evaluates anew"
            elif self._saved < 0:
                goes_on = "begins again at step 1, for no checkpoint was written"
            self._mistake = (
                f"{work} failed {self._failures} times {since}, and parallel.max_failures="
                f"{self._max}; the last time: {reasons[0]}; the same command {goes_on}"
            )
            return {"end": self._mistake}
        pause = 0.0
        if self._failures > 1:
            doublings = min(self._failures - 2, 64)  # more would not fit a float some day
            pause = min(LONGEST_BACKOFF_S, self._backoff * 2.0**doublings)
        return {"reason": reasons[0], "failures": self._failures, "pause_s": pause}
