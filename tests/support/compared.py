"""What runs of one config come to under other strategies and numbers of workers, side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from raysft.run.catalogue import Catalogue
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from raysft.train.checkpoint import read_weights


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
