"""Processes of `worlds.run` that are two to a node, as Ray Train says, with GPUs of 80 GB as far as
`train.replicas` asks: what a process holds of the first matrix is written beside its run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from tests.support import worlds

EACH = 2  # workers of a node


def main(size: int, kill_at: int, paths: list[Path]) -> None:
    """One process. Neighbours in rank are on different nodes: that is what has to be looked up."""
    from raysft import worker
    from raysft.parallel import World
    from raysft.parallel.fsdp import Fsdp
    from raysft.run.folder import run_folder
    from raysft.train import replicas

    rank, nodes = int(os.environ["RANK"]), max(1, size // EACH)
    os.environ["NODE_RANK"] = str(rank % nodes)

    def eighty_gb(device: torch.device) -> float:
        return 80e9

    replicas.device_bytes = eighty_gb
    build = worker.build_job

    def build_job(*args, **kwargs):  # type: ignore[no-untyped-def]
        job = build(*args, **kwargs)
        assert isinstance(job.strategy, Fsdp)
        mesh = next(iter(job.strategy.module.parameters())).device_mesh
        groups = mesh.mesh.tolist() if mesh.ndim == 2 else [mesh.mesh.tolist()]
        if World.current().is_main:
            found = [[r % nodes for r in group] for group in groups]
            written = run_folder(job.config) / f"nodes_{size}.json"
            written.write_text(json.dumps({"groups": groups, "nodes": found}))
        return job

    worker.build_job = build_job
    worlds.main(size, kill_at, paths)
