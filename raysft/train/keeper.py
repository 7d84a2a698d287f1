"""What goes on beside the steps of the loop: saves, evaluations, and the watch over progress."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch

from raysft.config.schedule import asked
from raysft.json_types import JsonObject
from raysft.run.catalogue import Saved
from raysft.run.evaluations import (
    Evaluation,
    is_given,
    place_answers,
    predictions_of,
    progress_of,
)
from raysft.run.ownership import Permit
from raysft.train.checkpoint import Saver, load_weights
from raysft.train.clock import Clock
from raysft.train.job import Job
from raysft.train.record import Record, Totals
from raysft.train.step import StepBatch
from raysft.train.watchdog import Watchdog

ABANDON_S = 10.0  # a save in flight may wait for workers that are gone


class Keeper:
    """What goes on beside the steps: saves, evaluations, and the watch over progress."""

    def __init__(
        self,
        job: Job,
        record: Record,
        totals: Totals,
        clock: Clock,
        saved: int | None,
        permit: Permit,
    ) -> None:
        """saved: the step that the run goes on from, where a checkpoint holds it. permit: asked
        before a checkpoint is written."""
        self.job, self.record = job, record
        self.totals, self.clock = totals, clock
        settings = job.config.checkpoint

        def spared(steps: list[int]) -> set[int]:
            found = set(self._left(steps))
            if settings.best is not None:
                found |= record.evaluations.bests(settings.best, settings.best_mode, steps)
            return found

        self.saver = Saver(
            job.catalogue,
            job.world,
            settings.keep,
            spared,
            job.extras,
            permit,
            record.settle,
            job.adapters.files if job.adapters is not None else None,
            record.lease.name if record.lease is not None else "",
        )
        self.first = True  # before the first step of this start
        self.saved = saved  # the last step that was saved, or is being
        self.watchdog = None
        if job.hung is not None:
            self.watchdog = Watchdog(job.config.parallel.timeout_s, job.hung)

    def beat(self, doing: str) -> None:
        """Tell the watchdog of progress."""
        if self.watchdog is not None:
            self.watchdog.beat(doing)

    def turn(self, batch: StepBatch, number: int) -> None:
        """A turn of a step begins: of many, each is progress."""
        self.beat(f"in step {batch.step}, turn {number + 1} of {len(batch.turns)}")

    def meet(self) -> None:
        """Wait for workers that are busy with what only they do. A collective, and no hang: who is
        busy is watched there."""
        self.first = False
        self.job.world.barrier(lambda: self.beat("waiting for the other workers"))

    def save(self, step: int, cursor: JsonObject | None, wait: bool) -> None:
        """Begin a checkpoint; with `wait` return when it is published."""
        with self.clock.aside():
            meta = {
                "cursor": cursor,
                "totals": self.totals.state(self.job.world),
                "clock": self.clock.state(),
                "world_size": self.job.world.size,
                "total_steps": self.job.total_steps,
                "asked": asked(self.job.config),
                "strategy": self.job.strategy.facts(),
                "time": time.time(),
                "chain": self.record.heads(),
                "run": self.job.identity or None,
            }
            more: dict[str, torch.Tensor] = {}
            if self.job.adapters is not None:
                meta["adapters"] = self.job.adapters.facts()
                more = self.job.adapters.tensors()
            self._saved()
            self.saver.start(step, self.job.strategy, meta, more)
            self.saved = step
            if wait:
                self._saved()

    def _saved(self) -> None:
        """Wait until no save is in flight. It may go to slow storage: that is no hang."""
        self.saver.wait(lambda: self.beat("waiting for a checkpoint to be written"))
        self.meet()  # rank 0 publishes, after the others have written

    def look(self) -> None:
        """Record saves that have ended. Raises UserError where one has failed."""
        for save in self.saver.finished():
            self.record.saved(save)

    def _left(self, steps: list[int]) -> list[int]:
        """Those of `steps` that are to be evaluated beside training, and were not yet."""
        evaluate, settings = self.job.evaluate, self.job.config.evaluate
        if evaluate is None or not settings.beside:
            return []
        done, measure = self.record.evaluations, evaluate.measure(False)
        return done.pending(steps, settings.every, self.job.total_steps, measure)

    def take_in(self, step: int) -> None:
        """Record what was evaluated beside training, up to `step`. A collective."""
        beside = self.job.beside
        for made in self.job.world.share(beside.made() if beside is not None else []):
            for reason in made.warnings:
                self._warn(made.step, reason)
            found = made.found  # of a step after this one: its checkpoint was damaged meanwhile
            if found is not None and found.step <= step:
                assert found.measure is not None  # it was made by this version
                if not self.record.evaluations.known(found.step, found.measure):
                    self._record(found, made.predictions, checkpoint=True)
            if beside is not None:
                beside.recorded(made.step)

    def evaluate_left(self, step: int) -> None:
        """At the end of training: no more is evaluated beside it; evaluate what is left. The model
        is then as it was. A collective."""
        job, world = self.job, self.job.world
        if job.beside is not None:
            job.beside.end(lambda: self.beat("waiting for the end of evaluations beside training"))
        self._saved()
        self.take_in(step)
        steps: list[int] = []
        if world.is_main:
            steps = self._left([saved.step for saved in job.catalogue.committed()])
        loaded = step
        for left in world.share(steps):
            self.beat(f"reading the checkpoint of step {left}")
            saved = Saved(left, job.catalogue.storage)
            found = world.gather(saved.damage(world.rank, world.size))
            reason = next((reason for reason in found if reason), None)
            if reason is not None:
                self._warn(left, f"{saved.where}: cannot be evaluated: {reason}")
                continue
            load_weights(saved, job.strategy)
            loaded = left
            self.evaluate(left, final=False, checkpoint=True)
        if loaded != step:
            load_weights(Saved(step, job.catalogue.storage), job.strategy)

    def evaluate(self, step: int, final: bool, checkpoint: bool = False) -> None:
        """Evaluate the model as it is, unless that was done before a restart. A collective.

        checkpoint: the model is that of one of this step, which is not the last.
        """
        evaluate = self.job.evaluate
        if evaluate is None:
            return
        measure = evaluate.measure(final)
        if self.record.evaluations.known(step, measure):
            return
        with self.clock.aside():
            self.job.strategy.module.eval()
            shown = progress_of(self.job.progress)

            def seen(done: int, total: int) -> None:
                self.beat(f"in the evaluation at step {step}")
                shown(done, total)

            lease = self.record.lease
            own = predictions_of(self.job.folder, step, lease.name if lease else "own")
            values = evaluate(final, own, seen, partial(self._warn, step))
            self.job.strategy.module.train()
        found = Evaluation(step, values, measure, final)
        self._record(found, own, checkpoint or step == self.saved)
        self.meet()

    def _record(self, found: Evaluation, predictions: Path | None, checkpoint: bool) -> None:
        """predictions: a file that is to be that of this evaluation, where it is there."""
        self.record.require()  # a worker that was frozen meanwhile may own nothing any more
        best, main = self.job.config.checkpoint.best, self.job.world.is_main
        if main and predictions is not None:
            place_answers(self.job.folder, predictions, found.step)
        if best is not None and not is_given(best, found.figures) and main:
            self._warn(found.step, f"checkpoint.best: {best} is in no figure of this evaluation")
        self.record.evaluation(found, checkpoint)
        if best is not None or self.job.config.evaluate.beside:
            self.saver.prune()

    def _warn(self, step: int, reason: str) -> None:
        self.record.event("warning", step=step, reason=reason)

    def finish(self, step: int) -> None:
        """All is saved and evaluated: wait for what is in flight."""
        self._saved()
        self.look()
        ended = step == self.job.total_steps
        if ended:
            self.record.event("finished", step=step)
        self.beat("waiting for loggers")
        self.record.logged(step, "finished" if ended else "stopped")

    def abandon(self) -> None:
        """Training has failed: let a save in flight end, whole or cleared away."""
        self.saver.join(ABANDON_S)

    def close(self) -> None:
        """Stop the watch."""
        if self.watchdog is not None:
            self.watchdog.close()
