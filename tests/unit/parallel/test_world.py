"""What workers wait for beside the steps: no chore of one is too long, a dead one ends the wait, a
thousand need no thousand sockets each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from raysft.config import Config
from raysft.driver.shares import Shares, worker_environment
from raysft.parallel.ddp import share_of
from raysft.parallel.strategy import State
from raysft.parallel.world import World

ROOT = Path(__file__).resolve().parents[3]

HEAD = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from raysft.parallel.world import World
rank, size = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=size,
                        timeout=timedelta(seconds=2))
world = World.current()
"""


def members(size: int, store: Path, body: str, **more: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", HEAD + body, str(rank), str(size), str(store)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def told(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[str]:
    """What each has printed, once all have ended well."""
    found = []
    for process in processes:
        said, errors = process.communicate(timeout=timeout)
        assert process.returncode == 0, errors
        found.append(said.strip())
    return found


CHORE = """
beats = []
world.barrier()
if world.is_main:
    time.sleep(5)  # more than twice what training's own group waits
world.barrier(lambda: beats.append(1))
begun = time.monotonic()
if world.is_main:
    time.sleep(5)
shared = world.share("of rank %d" % rank)
parts = world.gather_main(rank)
print(len(beats) > 5, shared, parts, world.gather(rank * 2))
"""


@pytest.mark.slow
def test_a_chore_of_one_may_take_longer_than_training_waits(tmp_path: Path) -> None:
    first, second = told(members(2, tmp_path / "store", CHORE))
    assert first.endswith("of rank 0 [0, 1] [0, 2]")
    assert second == "True of rank 0 [] [0, 2]"


DIES = """
world.barrier()
if world.is_main:
    os._exit(9)
try:
    world.barrier()
except RuntimeError:
    print("ended")
os._exit(0)
"""


@pytest.mark.slow
def test_the_death_of_one_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    first, *others = members(3, tmp_path / "store", DIES)
    begun = time.monotonic()
    assert first.wait(timeout=120) == 9
    assert told(others) == ["ended", "ended"]
    assert time.monotonic() - begun < 100  # not HOST_TIMEOUT


SOCKETS = """
def count():
    links = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
             if os.path.islink(f"/proc/self/fd/{n}")]
    return sum(link.startswith("socket:") for link in links)
before = count()
dist.new_group(backend="gloo")
made = count()
world.barrier()
world.gather(rank)
print(made - before, count() - made)
"""


@pytest.mark.slow
def test_groups_connect_who_speaks_to_whom_and_not_everybody(tmp_path: Path) -> None:
    shares = Shares(gpu=False, per_worker={"CPU": 1.0}, threads=1, room=1, data_cpus=1.0)
    size = 6
    lines = told(members(size, tmp_path / "store", SOCKETS, **worker_environment(Config(), shares)))
    counts = [[int(number) for number in line.split()] for line in lines]
    assert all(made < size - 1 for made, _ in counts)  # a full mesh: one a peer
    whole = told(members(size, tmp_path / "mesh", SOCKETS, TORCH_GLOO_LAZY_INIT="0"))
    assert all(int(line.split()[0]) >= size - 1 for line in whole)


def test_workers_that_hold_the_same_share_out_what_each_writes() -> None:
    sizes = [1000, 1, 700, 300, 2, 999, 50, 400, 600, 3]
    state: State = {
        "model": {f"w{n}": torch.zeros(size) for n, size in enumerate(sizes)},
        "optim": {
            f"w{n}": {key: torch.zeros(size) for key in ("step", "exp_avg", "exp_avg_sq")}
            for n, size in enumerate(sizes)
        },
    }
    for workers in (1, 2, 3, 7):
        parts = [share_of(state, World(n, workers, torch.device("cpu"))) for n in range(workers)]
        found = [name for part in parts for name in part.get("model", {})]
        assert sorted(found) == sorted(state["model"])
        moments = [(n, k) for p in parts for n, each in p.get("optim", {}).items() for k in each]
        assert sorted(moments) == sorted((n, k) for n, each in state["optim"].items() for k in each)
        weights = [
            sum(t.numel() for t in part.get("model", {}).values())
            + sum(t.numel() for each in part.get("optim", {}).values() for t in each.values())
            for part in parts
        ]
        assert max(weights) - min(weights) <= max(sizes)
        assert all(part.values() for part in parts)
    assert share_of({"model": {}, "optim": {}}, World(1, 2, torch.device("cpu"))) == {
        "model": {},
        "optim": {},
    }
