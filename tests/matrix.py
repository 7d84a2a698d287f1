"""The processes of the matrix test: one run after another, what moved, and what was resumed.

python -m tests.matrix SIZE ABANDON_AT CONFIG.yaml [CONFIG.yaml ...]

Every run is trained to its end. One named again_* is first trained up to step ABANDON_AT and left
there without a word, as a kill would leave it, and then continued from its last checkpoint.
Beside each run lies moved.json: which parameters train, and which of all have changed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests import worlds


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


def train_one(path: Path, size: int, abandon_at: int) -> None:
    """Train the run of one config as its docstring says."""
    from raysft.config import load_config
    from raysft.parallel import World
    from raysft.train.loop import train

    config, world = load_config(path, [f"parallel.workers={size}"]), World.current()
    if config.run.name.startswith("again_"):
        job = worlds.start(config, world)
        job.stream = Abandoned(job.stream, abandon_at)  # type: ignore[assignment]
        with suppress(AbandonedError):
            train(job)
        world.barrier()
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


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
