"""On a GPU the same steps are taken as on the CPU. No Ray: the training core runs anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raysft.parallel import World
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support.worlds import start, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def losses(folder: Path, name: str, device: str, **changes: Any) -> list[float]:
    job = start(tiny(folder, name, parallel__device=device, **changes), World.current(device))
    train(job)
    return [line["loss"] for line in read_lines(job.folder / "metrics.jsonl")]


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 2e-2), ("fp16", 2e-2)])
@pytest.mark.parametrize("method", ["none", "lora", "adalora"])
def test_losses_are_those_of_the_cpu(
    method: str, precision: str, tolerance: float, tmp_path: Path
) -> None:
    """Half precision takes the variable-length kernel, fp32 sdpa by document."""
    changes = {"peft__method": method, "train__max_steps": 8}
    expected = losses(tmp_path, "cpu", "cpu", **changes)
    found = losses(tmp_path, "gpu", "cuda", train__precision=precision, **changes)
    assert found == pytest.approx(expected, rel=tolerance)


def test_what_a_gpu_is_asked_for_is_recorded(tmp_path: Path) -> None:
    job = start(
        tiny(tmp_path, parallel__device="cuda", train__precision="bf16"), World.current("cuda")
    )
    train(job)
    line = read_lines(job.folder / "metrics.jsonl")[-1]
    assert 0 < line["peak_memory_gb"] < 10 and line["tflops"] > 0


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_run_on_a_gpu_resumes_exactly(optimizer: str, tmp_path: Path) -> None:
    changes = {"parallel__device": "cuda", "optim__optimizer": optimizer}
    whole = losses(tmp_path, "whole", "cuda", optim__optimizer=optimizer)
    config = tiny(tmp_path, "left", **changes)
    job = start(config, World.current("cuda"))
    job.signal = iter([0] * 5 + [2] * 20).__next__
    assert train(job) < 12
    train(start(config, World.current("cuda")))
    again = [line["loss"] for line in read_lines(job.folder / "metrics.jsonl")]
    assert again == pytest.approx(whole, rel=1e-6)
