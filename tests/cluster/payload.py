"""A small Ray Train job, as a stand-in for a long training run: python payload.py WORKERS STEPS.

Each worker says where it runs, then all reduce a tensor and rank 0 prints a line a step.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

# Before the session, as raysft.launch does: torch imported while a job connects failed at times
# ("oneMKL FATAL ERROR: Cannot load libtorch_cpu.so").
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raysft.session import ray_session


def work(settings: dict[str, Any]) -> None:
    """What a worker runs."""
    import ray
    import ray.train
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    node = next(n for n in ray.nodes() if n["NodeID"] == ray.get_runtime_context().get_node_id())
    rank = ray.train.get_context().get_world_rank()
    print(f"rank {rank} on {node['NodeName']} pid {os.getpid()}", flush=True)
    for step in range(1, settings["steps"] + 1):
        total = torch.ones(1)
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step} sum {total.item():g} at {time.time():.2f}", flush=True)
        time.sleep(0.1)


def main(workers: int, steps: int) -> None:
    """Train in the session this process is given."""
    with ray_session() as session:
        print(f"session embedded={session.embedded} cpus={session.cluster_cpus():g}", flush=True)
        with tempfile.TemporaryDirectory() as storage:
            TorchTrainer(
                work,
                train_loop_config={"steps": steps},
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    resources_per_worker={"CPU": 0.5},
                    placement_strategy="SPREAD",
                ),
                run_config=RunConfig(name="payload", storage_path=storage),
            ).fit()
        print("payload done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
