"""What runs of one config come to under other strategies and numbers of workers, side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raysft.audit import audit
from raysft.run.catalogue import Catalogue
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from raysft.train.checkpoint import read_weights
from tests.support import worlds

MATRIX = "tests.support.matrix"


def losses(folder: Path, name: str) -> list[float]:
    """Of each step of the run `name`."""
    return [line["loss"] for line in read_lines(folder / "runs" / name / "metrics.jsonl")]


def gradient(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Of its first step, as `tests.support.matrix` writes it."""
    return load_file(folder / "runs" / name / "gradient.safetensors")


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Of its newest checkpoint."""
    run = folder / "runs" / name
    saved, _ = Catalogue.of(read_config(run).checkpoint, run).newest()
    assert saved is not None
    return read_weights(saved)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of each parameter's largest gradient."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        size = value.abs().max().item()
        # What only shifts all scores of a row alike has no gradient but rounding.
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * max(size, 1e-2))


def goes_on(
    folder: Path, one: Path, whole: Path, again: Path, steps: int
) -> dict[str, torch.Tensor]:
    """Runs `one` on one worker, and `whole` and `again` on two, of which `again` is left before
    step 7 and gone on with: as one process, and to the last bit as if undisturbed. A checkpoint
    every 4 steps. Returns the weights of `whole`."""
    assert worlds.run(1, one, module=MATRIX) == 0
    assert worlds.run(2, whole, again, kill_at=7, module=MATRIX) == 0
    expected, found = losses(folder, one.stem), losses(folder, whole.stem)
    assert len(expected) == steps
    assert found == pytest.approx(expected, rel=1e-4)
    assert losses(folder, again.stem)[-4:] == found[-4:]  # from the checkpoint of step 4 on
    first, second = weights(folder, whole.stem), weights(folder, again.stem)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert audit(folder / "runs" / again.stem).clean
    return first
