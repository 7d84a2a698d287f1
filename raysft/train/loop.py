"""The training loop, on one screen: `train()` is what every worker runs, with or without Ray.

It takes steps from a stream, does them, and records them. Everything it writes can be cut back to a
checkpoint, so a worker group that starts again (after a kill, a resize, a new submission) goes on as
if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from raysft.config.schema import Config
from raysft.errors import UserError
from raysft.parallel import Strategy, World
from raysft.train import checkpoint
from raysft.train.metrics import Ledger, Lines, cut_back_run, quarantine_line, read_lines
from raysft.train.optim import learning_rate, make_optimizer, set_learning_rate
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


@dataclass
class Totals:
    """Running sums since the last logged line: identical on all workers, saved with checkpoints."""

    tasks: list[str]
    sums: torch.Tensor = field(init=False)
    counts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.sums = torch.zeros(2, 1 + len(self.tasks), dtype=torch.float64)
        self.counts = {}

    def add(self, sums: torch.Tensor, counts: dict[str, float]) -> None:
        """Add one step."""
        self.sums += sums.cpu()
        for key, value in counts.items():
            self.counts[key] = self.counts.get(key, 0.0) + value

    def losses(self) -> dict[str, float]:
        """Loss per supervised token: in all, and by task for tasks that were there."""
        mean = (self.sums[0] / self.sums[1].clamp(min=1)).tolist()
        found = {"loss": mean[0]}
        for column, task in enumerate(self.tasks, start=1):
            if self.sums[1, column] > 0:
                found[f"loss/{task}"] = mean[column]
        return found

    def state(self) -> dict[str, Any]:
        """For the checkpoint: lists of exact float64."""
        return {"sums": self.sums.tolist(), "counts": self.counts}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.sums = torch.tensor(state["sums"], dtype=torch.float64)
        self.counts = dict(state["counts"])


COUNTED = ("tokens", "positions", "supervised", "examples", "audio_seconds", "quarantined")


def train(job: Job) -> int:
    """Run from the last committed checkpoint (or from the start) to the last step; returns it."""
    config, world, strategy = job.config, job.world, job.strategy
    optimizer = make_optimizer(strategy.module, config.optim)
    totals, record = Totals(job.tasks), _Record(job)
    step, cursor = _restore(job, optimizer, totals)
    record.open(step)
    strategy.module.train()
    last_saved = step
    clock = _Clock()
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
                record.evaluation(step, final=False)
            if _due(config.checkpoint.every, step, job.total_steps):
                _save(job, step, optimizer, cursor, totals)
                last_saved = step
        if last_saved != step or not checkpoint.committed(job.folder):
            _save(job, step, optimizer, cursor, totals)
        if config.evaluate.at_end and not record.evaluated(step):
            record.evaluation(step, final=True)
    finally:
        job.stream.close()
        record.close()
    return step


def _due(every: int, step: int, total: int) -> bool:
    return bool(every) and step % every == 0 and step < total


def _restore(
    job: Job, optimizer: torch.optim.Optimizer, totals: Totals
) -> tuple[int, dict[str, Any] | None]:
    """Load the newest committed checkpoint; cut what was recorded after it."""
    found = job.world.gather(checkpoint.latest(job.folder))[0]
    step, cursor = 0, None
    if found is not None:
        meta = checkpoint.load(found, job.strategy.module, optimizer)
        step, cursor = meta["step"], meta["cursor"]
        totals.load(meta["totals"])
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
) -> None:
    meta = {"cursor": cursor, "totals": totals.state(), "world_size": job.world.size}
    keep = job.config.checkpoint.keep
    checkpoint.save(job.folder, step, job.strategy.module, optimizer, meta, keep, job.world)


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
    return dict(zip(COUNTED, world.sum(local).tolist()))


class _Clock:
    """Wall time since the last logged line, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self.begun = self.started = time.monotonic()
        self.waited = 0.0
        self.steps = 0

    def waiting(self) -> _Waiting:
        self.steps += 1
        return _Waiting(self)

    def lap(self) -> tuple[float, float, int]:
        """(seconds, seconds waited, steps) since the last lap."""
        now = time.monotonic()
        lap = (now - self.started, self.waited, self.steps)
        self.started, self.waited, self.steps = now, 0.0, 0
        return lap


class _Waiting:
    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def __enter__(self) -> None:
        self.begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.clock.waited += time.monotonic() - self.begun


class _Record:
    """Everything the loop writes, apart from checkpoints."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.known: set[str] = set()
        self.files: list[Any] = []

    def open(self, step: int) -> None:
        """Open the files, cut back to `step` already, to append."""
        job = self.job
        self._ledger = Ledger(job.folder, job.world.lanes(job.config.data.lanes))
        self.files = [self._ledger]
        known = [line["id"] for line in read_lines(job.folder / "quarantine.jsonl")]
        self.known = set(job.world.gather(known)[0])
        self.tensorboard = None
        if job.world.is_main:
            self._metrics = Lines(job.folder / "metrics.jsonl")
            self._quarantine = Lines(job.folder / "quarantine.jsonl")
            self._eval = Lines(job.folder / "eval.jsonl")
            self.files += [self._metrics, self._quarantine, self._eval]
            if job.config.log.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(
                    str(job.folder / "tensorboard"), purge_step=step + 1 if step else None
                )
                self.files.append(self.tensorboard)

    def ledger(self, batch: StepBatch) -> None:
        for mb in batch.micro_batches:
            self._ledger.write(mb.epoch, mb.step, mb.lane, mb.ids)

    def quarantine(self, batch: StepBatch, counts: dict[str, float]) -> None:
        """Name each newly quarantined example once; fail when there are too many of them."""
        if not counts["quarantined"]:
            return
        job = self.job
        local = [(mb.lane, q) for mb in batch.micro_batches for q in mb.quarantined]
        found = sorted(
            (item for part in job.world.gather(local) for item in part),
            key=lambda item: (item[0], item[1].id),
        )
        for _, example in found:
            if example.id in self.known:
                continue
            self.known.add(example.id)
            if job.world.is_main:
                self._quarantine.write(quarantine_line(example, batch.step))
        limit = job.config.data.max_quarantined
        if len(self.known) > limit * job.examples:
            path = job.folder / "quarantine.jsonl"
            raise UserError(
                f"data.max_quarantined: {len(self.known)} of {job.examples} examples are unusable, "
                f"more than {limit:.1%}; the last: {found[-1][1].id}: {found[-1][1].reason}; "
                f"all are named in {path}"
            )

    def metrics(
        self, batch: StepBatch, totals: Totals, clock: _Clock, rate: float, norm: float
    ) -> None:
        job, counts = self.job, totals.counts
        seconds, waited, _ = clock.lap()
        wait = job.world.sum([waited / max(seconds, 1e-9) / job.world.size]).item()
        line = {
            "step": batch.step,
            "epoch": batch.epoch,
            **totals.losses(),
            "lr": rate,
            "grad_norm": norm,
            "tokens": int(counts["tokens"]),
            "supervised_tokens": int(counts["supervised"]),
            "examples": int(counts["examples"]),
            "audio_seconds": round(counts["audio_seconds"], 3),
            "tokens_per_s": round(counts["tokens"] / seconds, 1),
            "padding": round(1 - counts["tokens"] / max(1.0, counts["positions"]), 6),
            "data_wait": round(wait, 4),
            "seconds": round(seconds, 4),
            "world_size": job.world.size,
        }
        totals.reset()
        if job.world.is_main:
            self._metrics.write(line)
            self._scalars(line, batch.step)
        if job.progress is not None:
            job.progress({**line, "total_steps": job.total_steps})

    def evaluation(self, step: int, final: bool) -> None:
        if self.job.evaluate is None:
            return
        module = self.job.strategy.module
        module.eval()
        values = self.job.evaluate(step, final)
        module.train()
        if self.job.world.is_main:
            self._eval.write({"step": step, **values})
            self._scalars(values, step)
        if self.job.progress is not None:
            self.job.progress({"step": step, "total_steps": self.job.total_steps, "eval": values})

    def evaluated(self, step: int) -> bool:
        """Whether the last step was evaluated already (before a restart)."""
        lines = read_lines(self.job.folder / "eval.jsonl")
        return bool(self.job.world.gather(any(line["step"] == step for line in lines))[0])

    def _scalars(self, values: dict[str, Any], step: int) -> None:
        if self.tensorboard is not None:
            for key, value in values.items():
                if isinstance(value, int | float) and key not in ("step", "epoch"):
                    self.tensorboard.add_scalar(key, value, step)

    def close(self) -> None:
        for file in self.files:
            file.close()
