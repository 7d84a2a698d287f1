"""Runs of pairs: the same gradient under every strategy and number of workers, and killed and gone
on with to the last bit. Three lanes, so that with two workers one has a turn of weight zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.support import pairs, worlds
from tests.support.compared import MATRIX, goes_on, gradient, same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS = 8


def write(folder: Path, name: str, strategy: str, mode: str = "padded") -> Path:
    """The config file of a run."""
    more = {"mode": mode, "lanes": 3, "window": 24, "tokens_per_batch": 500}
    tree = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "data": pairs.data(folder / "data", **more),
        "model": pairs.model(),
        "parallel": {"strategy": strategy, "device": "cpu"},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": STEPS, "precision": "fp32"},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 4},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("size", "mode"),
    [
        (2, "padded"),
        pytest.param(2, "packed", marks=pytest.mark.slow),
        pytest.param(3, "padded", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_one_process(size: int, mode: str, tmp_path: Path) -> None:
    one = write(tmp_path, "one", "ddp", mode)
    others = [write(tmp_path, name, name, mode) for name in ("ddp", "fsdp", "zero2")]
    assert worlds.run(1, one, kill_at=-1, module=MATRIX) == 0
    assert worlds.run(size, *others, kill_at=-1, module=MATRIX) == 0
    expected = gradient(tmp_path, "one")
    assert {name.split(".")[1] for name in expected} == {"llm", "flow"}
    assert all(torch.isfinite(value).all() for value in expected.values())
    for strategy in ("ddp", "fsdp", "zero2"):
        same(gradient(tmp_path, strategy), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("fsdp", marks=pytest.mark.slow),
        pytest.param("zero2", marks=pytest.mark.slow),
    ],
)
def test_runs_go_on_to_the_last_bit(strategy: str, tmp_path: Path) -> None:
    one = write(tmp_path, "one", "ddp")
    two = [write(tmp_path, name, strategy) for name in ("whole", "again_whole")]
    goes_on(tmp_path, one, *two, STEPS)
