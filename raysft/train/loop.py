"""The training loop, on one screen: `train()` is what every worker runs, with or without Ray.

It takes steps from a stream, does them, and records them. Everything it writes can be cut back to
a checkpoint, so a worker group that starts again (after a kill, a resize, a new submission) goes on
as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from raysft.config.schedule import another_length
from raysft.config.schedule import rate as rate_at
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.losses.term import Sums
from raysft.parallel import World
from raysft.parallel.strategy import Stepped
from raysft.run import place
from raysft.run.evaluations import clear_drafts, due
from raysft.run.ownership import Permit
from raysft.run.signals import LEAVE
from raysft.train.checkpoint import load, load_weights, newest_sound
from raysft.train.clock import Clock
from raysft.train.job import Job
from raysft.train.keeper import Keeper
from raysft.train.loads import Loads
from raysft.train.metrics import cut_back_run, last_recorded, last_sign_of_life
from raysft.train.record import Record, Totals
from raysft.train.step import StepBatch, forward_backward


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
        figures=job.objective.figures if job.objective is not None else lambda counts: {},
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
    signal, last = 0, min(job.until or job.total_steps, job.total_steps)
    first = step + 1
    try:
        meanwhile = config.evaluate.beside  # then it is made up for, as others are
        if due(config.evaluate.every, step, job.total_steps) and not meanwhile:
            keeper.evaluate(step, final=False)  # where it was interrupted after the step was saved
        batches = job.stream.open(cursor)
        while step < last and signal != LEAVE:
            keeper.beat("waiting for data")
            with clock.waiting():
                batch = next(batches)
            if keeper.first:  # some have loaded, and read, for longer
                keeper.meet()
            keeper.beat(f"in step {batch.step}")
            if job.objective is not None:
                batch = job.objective.prepared(batch, keeper.beat)
            ready = job.beside.ready() if job.beside is not None else 0
            counts, signal, ready = _counts(world, batch, job.signal(), ready)
            record.quarantine(batch, counts)
            step, cursor = batch.step, batch.after
            rate = rate_at(config.optim, step, job.total_steps)
            sums, found = _updated(job, batch, counts, rate, partial(keeper.turn, batch))
            world.sum_tensor(sums.values)
            totals.add(sums, counts, found.skipped)
            record.ledger(batch)
            record.skipped(step, totals, found)
            if step == first:
                record.began(step)
            if step % config.log.every == 0 or step == job.total_steps:
                record.metrics(batch, totals, clock, rate * config.optim.lr, found.norm)
            evaluate = due(config.evaluate.every, step, job.total_steps)
            kept = evaluate and (meanwhile or config.checkpoint.best is not None)
            kept = kept or step == last < job.total_steps
            if signal or kept or due(config.checkpoint.every, step, job.total_steps):
                keeper.save(step, cursor, wait=bool(signal))
            if evaluate and not meanwhile and signal != LEAVE:
                keeper.evaluate(step, final=False)
            if ready:
                keeper.take_in(step)
            keeper.look()
        if keeper.saved != step:  # not asked of the storage: rank 0 may still be publishing
            keeper.save(step, cursor, wait=True)
        if signal == LEAVE and step < job.total_steps:
            record.event("stopped", step=step, reason="told to leave")
        else:
            if meanwhile:
                keeper.evaluate_left(step)
            if step < job.total_steps:
                record.event("stopped", step=step, reason=f"to go no further than step {last}")
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


def _updated(
    job: Job,
    batch: StepBatch,
    counts: dict[str, float],
    rate: float,
    begins: Callable[[int], None],
) -> tuple[Sums, Stepped]:
    """Move the weights by a batch, as often as the objective says; this worker's terms, of all
    times, and what became of the last one, or of one that was skipped."""
    strategy, times = job.strategy, job.objective.updates if job.objective is not None else 1
    sums, became = None, Stepped(0.0, skipped=False)
    for update in range(times):
        own = forward_backward(
            strategy, job.world, batch, job.tasks, counts, job.config.run.seed, begins, update
        )
        if sums is not None:
            own.values += sums.values
        sums = own
        if not counts["supervised"]:
            strategy.drop()
            continue
        last = update == times - 1
        found = strategy.step(rate, partial(job.after_step, batch.step) if last else _nothing)
        became = became if became.skipped else found
    assert sums is not None
    return sums, became


def _nothing() -> None:
    pass


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
        if record.lease is not None:
            clear_drafts(job.folder, record.lease.name.partition(".")[0])
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


def _counts(
    world: World, batch: StepBatch, signal: int, ready: int
) -> tuple[dict[str, float], int, int]:
    """What this step holds over all workers, and rank 0's signal and number of evaluations to
    record; one small collective, before the forward pass."""
    local = batch.counts()
    if world.size == 1:  # all is there already: no way over its device and back
        return local, signal, ready
    own = [float(signal), float(ready)] if world.is_main else [0.0, 0.0]
    *found, told, there = world.sum([*local.values(), *own]).tolist()
    return dict(zip(local, found, strict=True)), int(told), int(there)
