"""Train without Ray in real processes over gloo: what the tests of exactness run.

python -m tests.worlds SIZE KILL_AT CONFIG.yaml [CONFIG.yaml ...]

KILL_AT: a step after whose metrics line rank 0 kills itself with SIGKILL (0: never).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(size: int, *configs: Path, kill_at: int = 0) -> int:
    """Run each config with `size` processes, one after the other; returns rank 0's exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.worlds", str(size), str(kill_at), *map(str, configs)],
                cwd=ROOT,
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "RENDEZVOUS": f"{scratch}/store",
                    "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.DEVNULL if rank else None,
            )
            for rank in range(size)
        ]
        code = workers[0].wait()
        for worker in workers[1:]:
            if code:
                worker.kill()  # it would wait for rank 0 for ever
            worker.wait()
        return code


def main(size: int, kill_at: int, paths: list[Path]) -> None:
    """One process: the same path as a Ray Train worker's, with an in-process reader."""
    import torch
    import torch.distributed as dist

    from raysft import worker
    from raysft.config import load_config
    from raysft.data.plan import Cursor
    from raysft.parallel import World
    from raysft.prepare import prepare
    from raysft.rundir import run_folder
    from raysft.train.catalogue import Catalogue
    from raysft.train.loop import train

    torch.set_num_threads(1)
    worker.quiet()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=int(os.environ["RANK"]),
        world_size=size,
    )
    for path in paths:
        config = load_config(path, [f"parallel.workers={size}"])
        folder = run_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        saved, _ = Catalogue.of(config.checkpoint, folder).newest()
        cursor = Cursor.from_json(saved.meta()["cursor"]) if saved else None
        prepared = prepare(config, folder, cursor)

        def progress(line: dict[str, Any]) -> None:
            if kill_at and "loss" in line and line["step"] >= kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        data = worker.Data.in_process(
            config, prepared.encoder, folder, prepared.train, prepared.eval
        )
        world = World.current()
        train(worker.build_job(config, folder, world, data, prepared.total_steps, progress))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
