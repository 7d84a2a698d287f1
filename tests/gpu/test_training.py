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
    changes = {
        "parallel__device": "cuda",
        "optim__optimizer": optimizer,
        "train__precision": "fp32",
    }
    whole = losses(tmp_path, "whole", "cuda", optim__optimizer=optimizer, train__precision="fp32")
    config = tiny(tmp_path, "left", **changes)
    job = start(config, World.current("cuda"))
    job.signal = iter([0] * 5 + [2] * 20).__next__
    assert train(job) < 12
    train(start(config, World.current("cuda")))
    again = [line["loss"] for line in read_lines(job.folder / "metrics.jsonl")]
    assert again == pytest.approx(whole, rel=1e-6)


def test_auto_is_bf16_and_its_shapes_leave_memory_alone(tmp_path: Path) -> None:
    """Rows of one shape: what is reserved after the first steps grows no more."""
    job = start(tiny(tmp_path, parallel__device="cuda"), World.current("cuda"))
    assert job.config.train.precision == "bf16" and job.start["static_shapes"]
    reserved: list[int] = []
    job.signal = lambda: reserved.append(torch.cuda.memory_reserved()) or 0
    train(job)
    assert len({*reserved[4:]}) == 1


def test_documents_without_positions_change_nothing() -> None:
    """Ends of documents are repeated, to be as many every time."""
    from raysft.models.attention import document_mask, segments_attention

    generator = torch.Generator("cuda").manual_seed(0)
    module = torch.nn.Module()
    found = []
    for ends in ([0, 5, 69, 320], [0, 5, 69, 320, 320, 320]):
        shape = (1, 4, 320, 64)
        generator.manual_seed(0)
        qkv = [
            torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
            for _ in range(3)
        ]
        for each in qkv:
            each.requires_grad_()
        mask = document_mask(torch.tensor(ends, dtype=torch.int32), torch.device("cuda"))
        out, _ = segments_attention(module, *qkv, mask)
        out.float().square().sum().backward()
        found.append([out, *(each.grad for each in qkv)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_deterministic_has_the_same_bits_twice(tmp_path: Path) -> None:
    """Flash attention's backward pass among it."""
    changes = {"train__precision": "bf16", "train__deterministic": True}
    one, other = (losses(tmp_path, name, "cuda", **changes) for name in ("one", "other"))
    assert one == other
