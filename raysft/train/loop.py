"""The training loop, on one screen: `train()` is what every worker runs, with or without Ray.

It takes steps from a stream, does them, and records them. Everything it writes can be cut back to
a checkpoint, so a worker group that starts again (after a kill, a resize, a new submission) goes on
as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from raysft.config.schema import Config
from raysft.parallel import Strategy, World
from raysft.train import checkpoint
from raysft.train.metrics import cut_back_run
from raysft.train.optim import learning_rate, make_optimizer, set_learning_rate
from raysft.train.record import Clock, Record, Totals
from raysft.train.step import StepBatch, forward_backward


class Stream(Protocol):
    """Ready step batches of this worker, in order, from a cursor on."""

    def open(self, cursor: dict[str, Any] | None) -> Iterator[StepBatch]: ...

    def close(self) -> None: ...


@dataclass
class Job:
    """What a worker needs to train, whoever built it."""

    config: Config
    folder: Path
    world: World
    strategy: Strategy
    stream: Stream
    tasks: list[str]
    total_steps: int
    examples: int  # in the index and rejected from it: what max_quarantined is a share of
    evaluate: Callable[[int, bool], dict[str, float]] | None = None
    progress: Callable[[dict[str, Any]], None] | None = None


COUNTED = ("tokens", "positions", "supervised", "examples", "audio_seconds", "quarantined")


def train(job: Job) -> int:
    """Run from the last committed checkpoint (or from the start) to the last step; returns it."""
    config, world, strategy = job.config, job.world, job.strategy
    optimizer = make_optimizer(strategy.module, config.optim)
    totals, clock = Totals(job.tasks), Clock()
    record = Record(config, job.folder, world, job.examples, job.total_steps, job.progress)
    step, cursor = _restore(job, optimizer, totals, clock)
    record.open(step)
    strategy.module.train()
    last_saved = step
    try:
        batches = job.stream.open(cursor)
        while step < job.total_steps:
            with clock.waiting():
                batch = next(batches)
            counts = _counts(world, batch)
            record.quarantine(batch, counts)
            sums = forward_backward(
                strategy,
                world,
                batch,
                job.tasks,
                counts["supervised"],
                config.run.seed,
                config.train.precision,
            )
            norm = strategy.clip(config.optim.clip)
            rate = learning_rate(config.optim, batch.step, job.total_steps)
            set_learning_rate(optimizer, rate)
            if counts["supervised"]:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, cursor = batch.step, batch.after
            totals.add(world.sum_tensor(sums), counts)
            record.ledger(batch)
            if step % config.log.every == 0 or step == job.total_steps:
                record.metrics(batch, totals, clock, rate, float(norm))
            if _due(config.evaluate.every, step, job.total_steps):
                _evaluate(job, step, record, clock, final=False)
            if _due(config.checkpoint.every, step, job.total_steps):
                _save(job, step, optimizer, cursor, totals, clock)
                last_saved = step
        if last_saved != step or not checkpoint.committed(job.folder):
            _save(job, step, optimizer, cursor, totals, clock)
        if config.evaluate.at_end and not record.evaluated(step):
            _evaluate(job, step, record, clock, final=True)
    finally:
        job.stream.close()
        record.close()
    return step


def _due(every: int, step: int, total: int) -> bool:
    return bool(every) and step % every == 0 and step < total


def _restore(
    job: Job, optimizer: torch.optim.Optimizer, totals: Totals, clock: Clock
) -> tuple[int, dict[str, Any] | None]:
    """Load the newest committed checkpoint; cut what was recorded after it."""
    found = job.world.gather(checkpoint.latest(job.folder))[0]
    step, cursor = 0, None
    if found is not None:
        meta = checkpoint.load(found, job.strategy.module, optimizer)
        step, cursor = meta["step"], meta["cursor"]
        totals.load(meta["totals"])
        clock.load(meta["clock"])
    if job.world.is_main:
        cut_back_run(job.folder, step)
    job.world.barrier()
    return step, cursor


def _save(
    job: Job,
    step: int,
    optimizer: torch.optim.Optimizer,
    cursor: dict[str, Any] | None,
    totals: Totals,
    clock: Clock,
) -> None:
    with clock.aside():
        meta = {
            "cursor": cursor,
            "totals": totals.state(),
            "clock": clock.state(),
            "world_size": job.world.size,
        }
        keep = job.config.checkpoint.keep
        checkpoint.save(job.folder, step, job.strategy.module, optimizer, meta, keep, job.world)


def _evaluate(job: Job, step: int, record: Record, clock: Clock, final: bool) -> None:
    if job.evaluate is None:
        return
    with clock.aside():
        job.strategy.module.eval()
        values = job.evaluate(step, final)
        job.strategy.module.train()
    record.evaluation(step, values)


def _counts(world: World, batch: StepBatch) -> dict[str, float]:
    """What this step holds over all workers; one small collective, before the forward pass."""
    local = [
        float(sum(turn.tokens for turn in batch.turns)),
        float(sum(turn.positions for turn in batch.turns)),
        float(sum(turn.supervised for turn in batch.turns)),
        float(sum(len(mb.ids) for mb in batch.micro_batches)),
        float(sum(mb.seconds for mb in batch.micro_batches)),
        float(sum(len(mb.quarantined) for mb in batch.micro_batches)),
    ]
    # One worker's are already there: no way over its device and back.
    return dict(zip(COUNTED, world.sum(local).tolist() if world.size > 1 else local))
