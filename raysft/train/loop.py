"""The training loop, on one screen: `train()` is what every worker runs, with or without Ray.

It takes steps from a stream, does them, and records them. Everything it writes can be cut back to
a checkpoint, so a worker group that starts again (after a kill, a resize, a new submission) goes on
as if nothing had happened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from raysft.config.schedule import another_length, asked
from raysft.config.schedule import rate as rate_at
from raysft.config.schema import Config
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.models.routing import Routing
from raysft.parallel import Strategy, World
from raysft.parallel.strategy import Stepped
from raysft.run import place
from raysft.run.catalogue import Catalogue, Saved
from raysft.run.evaluations import Evaluation, Measure, progress_of
from raysft.run.ownership import Lease, Permit
from raysft.run.signals import LEAVE
from raysft.train.checkpoint import Saver, load, load_weights, newest_sound
from raysft.train.flops import Cost
from raysft.train.loads import Loads
from raysft.train.metrics import cut_back_run, last_recorded, last_sign_of_life
from raysft.train.record import Clock, Record, Totals
from raysft.train.step import StepBatch, forward_backward
from raysft.train.watchdog import Watchdog


class Stream(Protocol):
    """Ready step batches of this worker, in order, from a cursor on."""

    def open(self, cursor: JsonObject | None) -> Iterator[StepBatch]: ...

    def close(self) -> None: ...


class AdapterState(Protocol):
    """State of adapters beside their weights (the ranks of AdaLoRA), and what is made of them."""

    def after_step(self, step: int) -> None:
        """After the weights have moved, while their gradients are still there."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """State to save, and to be filled on loading; the same on every worker."""
        ...

    def facts(self) -> JsonObject:
        """The rest of the state, as JSON."""
        ...

    def load_facts(self, facts: JsonObject) -> None:
        """The inverse of `facts`."""
        ...

    def files(self, weights: dict[str, torch.Tensor]) -> dict[str, bytes]:
        """An adapter of these weights in peft's layout: path -> content."""
        ...


class Evaluate(Protocol):
    """Evaluation of the model as it is. final: of all examples, not the share that is looked at
    while training."""

    def measure(self, final: bool) -> Measure:
        """What an evaluation would measure; the same on every worker."""
        ...

    def __call__(
        self,
        final: bool,
        predictions: Path | None = None,
        seen: Callable[[int, int], None] = ...,
        tell: Callable[[str], None] = ...,
    ) -> dict[str, float]:
        """Figures by name. A collective.

        predictions: file for every reference and hypothesis. seen: called before each
        round of batches with how many are done and how many there are. tell: given, on rank 0,
        what the user should know of the figures.
        """
        ...


@dataclass
class Job:
    """What a worker needs to train, whoever built it.

    signal: rank 0's is asked before every step, see `monitor`. weights: a checkpoint to begin with
        where the run has none. extras: files that every checkpoint carries. start: facts for the
        first event of this start. hung: told why, before a worker that makes no progress ends its
        process; None: never ends it. adapters: what `peft.method` trains, None for all weights.
    routing: of a mixture whose routers are known.
    cost: FLOPs of what is counted, for the metrics; None: not known. submitted: when this start was
        asked for (time.time()), where it is the first of a submission: until then the run was idle.
    identity: what tells this run from others: where the ledger's chains begin, and what each of its
        checkpoints names; "": nobody asks.
    lease: the driver's, with this group's number; None: there is no driver, and rank 0 owns the run
        while it trains.
    """

    config: Config
    folder: Path
    world: World
    strategy: Strategy
    stream: Stream
    tasks: list[str]
    total_steps: int
    examples: int  # in the index and rejected from it: what max_quarantined is a share of
    catalogue: Catalogue
    evaluate: Evaluate | None = None
    progress: Callable[[JsonObject], None] | None = None
    signal: Callable[[], int] = lambda: 0
    weights: Saved | None = None
    adapters: AdapterState | None = None
    cost: Cost | None = None
    routing: Routing | None = None
    extras: dict[str, bytes] = field(default_factory=dict)
    start: JsonObject = field(default_factory=dict)
    submitted: float | None = None
    identity: str = ""
    lease: Lease | None = None
    hung: Callable[[str], None] | None = None

    def after_step(self, step: int) -> None:
        """What adapters do between two steps, with the gradients of the first."""
        if self.adapters is not None:
            self.adapters.after_step(step)


ABANDON_S = 10.0  # a save in flight may wait for workers that are gone


def train(job: Job) -> int:
    """Run from the newest sound checkpoint (or from the start) to the last step, or to the step
    at which it was told to leave; returns that step."""
    config, world, strategy = job.config, job.world, job.strategy
    loads = None if job.routing is None else Loads(job.routing, config.log.dead_experts)
    totals, clock = Totals(job.tasks, loads=loads), Clock()
    record = Record(
        config,
        job.folder,
        world,
        job.examples,
        job.total_steps,
        job.progress,
        job.cost,
        mixture=loads is not None,
    )
    try:
        record.take_over(job.lease)
        permit = _permit(job, record)
        step, cursor = _restore(job, record, totals, clock, permit)
    except BaseException:
        record.close()
        raise
    strategy.module.train()
    saved = step if cursor is not None else None
    keeper = Keeper(job, record, totals, clock, saved, permit)
    signal = 0
    try:
        if _due(config.evaluate.every, step, job.total_steps):
            keeper.evaluate(step, final=False)  # where it was interrupted after the step was saved
        batches = job.stream.open(cursor)
        while step < job.total_steps and signal != LEAVE:
            keeper.beat("waiting for data")
            with clock.waiting():
                batch = next(batches)
            if keeper.first:  # some have loaded, and read, for longer
                keeper.meet()
            keeper.beat(f"in step {batch.step}")
            counts, signal = _counts(world, batch, job.signal())
            record.quarantine(batch, counts)
            sums = forward_backward(
                strategy,
                world,
                batch,
                job.tasks,
                counts,
                config.run.seed,
                partial(keeper.turn, batch),
            )
            step, cursor = batch.step, batch.after
            rate = rate_at(config.optim, step, job.total_steps)
            found = Stepped(0.0, skipped=False)
            if counts["supervised"]:
                found = strategy.step(rate, partial(job.after_step, step))
            else:
                strategy.drop()
            world.sum_tensor(sums.values)
            totals.add(sums, counts, found.skipped)
            record.ledger(batch)
            record.skipped(step, totals, found)
            if step % config.log.every == 0 or step == job.total_steps:
                record.metrics(batch, totals, clock, rate * config.optim.lr, found.norm)
            evaluate = _due(config.evaluate.every, step, job.total_steps)
            best = evaluate and config.checkpoint.best is not None
            if signal or best or _due(config.checkpoint.every, step, job.total_steps):
                keeper.save(step, cursor, wait=bool(signal))
            if evaluate and signal != LEAVE:
                keeper.evaluate(step, final=False)
            keeper.look()
        if keeper.saved != step:  # not asked of the storage: rank 0 may still be publishing
            keeper.save(step, cursor, wait=True)
        if signal == LEAVE and step < job.total_steps:
            record.event("stopped", step=step, reason="told to leave")
        elif config.evaluate.at_end:
            if config.checkpoint.best is not None and config.evaluate.every:
                keeper.evaluate(step, final=False)  # what the steps before are compared by
            keeper.evaluate(step, final=True)
        keeper.finish(step)
        record.ended()
    except (OSError, UserError):
        keeper.abandon()
        raise
    finally:
        job.stream.close()
        keeper.close()
        record.close()
    return step


def _due(every: int, step: int, total: int) -> bool:
    return bool(every) and step % every == 0 and 0 < step < total


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

        def bests(steps: list[int]) -> set[int]:
            if settings.best is None:
                return set()
            return record.evaluations.bests(settings.best, settings.best_mode, steps)

        self.saver = Saver(
            job.catalogue,
            job.world,
            settings.keep,
            bests,
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

    def evaluate(self, step: int, final: bool) -> None:
        """Evaluate the model as it is, unless that was done before a restart. A collective."""
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

            predictions = self.job.folder / "predictions" / f"step_{step}.jsonl"
            lease = self.record.lease
            own = predictions.with_name(f".{lease.name if lease else 'own'}.{predictions.name}")
            values = evaluate(final, own, seen, partial(self._warn, step))
            self.record.require()  # a worker that was frozen meanwhile may own nothing any more
            if own.exists() and self.job.world.is_main:
                os.replace(own, predictions)
            self.job.strategy.module.train()
        best = self.job.config.checkpoint.best
        if best is not None and best not in values and self.job.world.is_main:
            self._warn(step, f"checkpoint.best: {best} is in no figure of this evaluation")
        found = Evaluation(step, values, measure, final)
        self.record.evaluation(found, checkpoint=step == self.saved)
        if best is not None:
            self.saver.prune()
        self.meet()

    def _warn(self, step: int, reason: str) -> None:
        self.record.event("warning", step=step, reason=reason)

    def finish(self, step: int) -> None:
        """All is saved and evaluated: wait for what is in flight."""
        self._saved()
        self.look()
        if step == self.job.total_steps:
            self.record.event("finished", step=step)

    def abandon(self) -> None:
        """Training has failed: let a save in flight end, whole or cleared away."""
        self.saver.join(ABANDON_S)

    def close(self) -> None:
        """Stop the watch."""
        if self.watchdog is not None:
            self.watchdog.close()


def _permit(job: Job, record: Record) -> Permit:
    """What is to be asked before a checkpoint is written, by the group that has taken over."""
    assert record.lease is not None
    if job.config.checkpoint.path is None or not job.identity:
        return record.lease
    return place.Claim(record.lease, job.catalogue.storage, job.identity, str(job.folder))


def _restore(
    job: Job,
    record: Record,
    totals: Totals,
    clock: Clock,
    permit: Permit,
) -> tuple[int, JsonObject | None]:
    """Load the newest sound checkpoint; cut what was recorded after it; open the records."""
    found, skipped = newest_sound(job.catalogue, job.world)
    step, cursor, meta, length = 0, None, {}, None
    if found is not None:
        if isinstance(permit, place.Claim):
            place.refuse(found, job.folder, permit.run)
        adapters = job.adapters
        meta = load(found, job.strategy, adapters.tensors() if adapters is not None else None)
        if adapters is not None:
            adapters.load_facts(meta["adapters"])
        job.strategy.load_facts(meta["strategy"])
        step, cursor = meta["step"], meta["cursor"]
        length = another_length(
            job.config, step, meta.get("total_steps"), job.total_steps, meta.get("asked")
        )
        totals.load(meta["totals"], job.world)
        clock.load(meta["clock"])
    elif job.weights is not None:
        load_weights(job.weights, job.strategy)
    last, seen, lost = 0, None, []
    if job.world.is_main:
        last, seen = last_recorded(job.folder), last_sign_of_life(job.folder)
        if isinstance(permit, place.Claim):
            permit.take()
        permit.require()
        job.catalogue.clear(step)
        permit.require()
        lost = cut_back_run(job.folder, step)
    job.world.barrier()
    record.open(step, job.identity, meta.get("chain"))
    for reason in skipped:
        record.event("skipped", reason=reason)
    for reason in lost:
        record.event("warning", step=step, reason=reason)
    if length is not None:
        record.event("length", step=step, total_steps=job.total_steps, reason=length)
    idle = max(0.0, job.submitted - seen) if job.submitted and seen else 0.0
    record.begun(step, last, meta.get("time"), meta.get("world_size"), job.start, idle)
    return step, cursor


def _counts(world: World, batch: StepBatch, signal: int) -> tuple[dict[str, float], int]:
    """What this step holds over all workers, and rank 0's signal; one small collective, before the
    forward pass."""
    local = batch.counts()
    if world.size == 1:  # all is there already: no way over its device and back
        return local, signal
    *found, told = world.sum([*local.values(), float(signal if world.is_main else 0)]).tolist()
    return dict(zip(local, found, strict=True)), int(told)
