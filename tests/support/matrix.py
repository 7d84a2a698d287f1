"""The processes of the matrix test: one run after another, what moved, and what was resumed.

`main` is what each runs. Every run is trained to its end. One named again_* is first trained up to
step `abandon_at` and left there without a word, as a kill would leave it, and then continued from
its last checkpoint. One named left_* is left there and not continued. With `abandon_at` < 0 nothing
is trained: the gradient of the first step is written to gradient.safetensors.

Beside each run lies moved.json: which parameters train, and which of all have changed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import Replicate, Shard

from tests.support import worlds

if TYPE_CHECKING:
    from raysft.train.job import Job


class AbandonedError(Exception):
    """Raised on every worker before the step at which a run is left."""


class Abandoned:
    """The stream of a job, that ends in AbandonedError before step `at`."""

    def __init__(self, stream: Any, at: int) -> None:
        self.stream, self.at = stream, at

    def open(self, cursor: dict[str, Any] | None) -> Iterator[Any]:
        for batch in self.stream.open(cursor):
            if batch.step >= self.at:
                raise AbandonedError
            yield batch

    def close(self) -> None:
        self.stream.close()


def shards(module: torch.nn.Module) -> dict[str, tuple[bool, torch.Tensor]]:
    """Name -> (trains, this worker's part of the values, copied)."""
    found = {}
    for name, parameter in module.named_parameters():
        local = getattr(parameter, "ds_tensor", parameter)  # zero3 empties the parameter itself
        local = local.to_local() if hasattr(local, "to_local") else local
        name = name.removeprefix("module.")
        found[name] = (parameter.requires_grad, local.detach().clone())
    return found


def write_gradient(job: Job) -> None:
    """The whole gradient of the first step, by parameter, as the optimizer would take it."""
    from safetensors.torch import save_file

    from raysft.train.step import forward_backward

    batch = next(job.stream.open(None))
    if job.objective is not None:
        batch = job.objective.prepared(batch, lambda doing: None)
    local = batch.counts()
    counts = dict(zip(local, job.world.sum(list(local.values())).tolist()))
    forward_backward(job.strategy, job.world, batch, job.tasks, counts, job.config.run.seed)
    if hasattr(job.strategy, "reduce"):
        job.strategy.reduce()
    found = {}
    for name, parameter in job.strategy.module.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        if job.config.parallel.strategy.startswith("zero"):
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(parameter)
        if job.config.parallel.strategy == "ep":
            gradient = job.strategy.of_all(name, gradient)
            if len(gradient.placements) == 2:  # torch gathers along one dimension at a time alone
                gradient = gradient.redistribute(placements=[Shard(0), Replicate()])
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name.removeprefix("module.")] = whole.detach().cpu().contiguous()
    job.stream.close()
    if job.world.is_main:
        save_file(found, job.folder / "gradient.safetensors")
    job.world.barrier()


def train_one(path: Path, size: int, abandon_at: int) -> None:
    """Train the run of one config as its docstring says."""
    from raysft.config import load_config
    from raysft.parallel import World
    from raysft.train.loop import train

    config, world = load_config(path, [f"parallel.workers={size}"]), World.current()
    if abandon_at < 0:
        write_gradient(worlds.start(config, world))
        return
    if config.run.name.startswith(("again_", "left_")) and abandon_at:
        job = worlds.start(config, world)
        job.stream = Abandoned(job.stream, abandon_at)  # type: ignore[assignment]
        with suppress(AbandonedError):
            train(job)
        if config.run.name.startswith("again_"):
            for thread in threading.enumerate():  # a process that has died saves nothing more
                if thread.name == "checkpoint":
                    thread.join()
        world.barrier()
        if config.run.name.startswith("left_"):
            os._exit(0)  # whatever is still being saved
    job = worlds.start(config, world)
    before = shards(job.strategy.module)
    train(job)
    after = shards(job.strategy.module)
    parts = world.gather(
        {
            name: (trains, not torch.equal(values, after[name][1]))
            for name, (trains, values) in before.items()
        }
    )
    moved = {
        name: {"trains": trains, "moved": any(part[name][1] for part in parts)}
        for name, (trains, _) in parts[0].items()
    }
    if world.is_main:
        (job.folder / "moved.json").write_text(json.dumps(moved))


def main(size: int, abandon_at: int, paths: list[Path]) -> None:
    """One process."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=int(os.environ["RANK"]),
        world_size=size,
    )
    for path in paths:
        train_one(path, size, abandon_at)
    dist.barrier()
    dist.destroy_process_group()
