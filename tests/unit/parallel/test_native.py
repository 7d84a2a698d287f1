"""What ddp and fsdp take besides: copies of shards, offload, half precision, 8-bit state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raysft.config import Config, to_yaml
from raysft.errors import UserError
from raysft.parallel import World, make, make_strategy
from raysft.run.lines import read_lines
from tests.support import worlds
from tests.support.worlds import tiny

# What each is held against: (its own settings, workers, settings of the reference, tolerance).
# In half precision rounding differs with the order of sums.
FSDP = {"parallel__strategy": "fsdp"}
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any], float]] = {
    "two copies of two shards": ({**FSDP, "parallel__replicate": 2}, 4, {}, 1e-5),
    "offloaded": ({**FSDP, "parallel__offload": "parameters"}, 2, {}, 1e-5),
    "bf16": ({**FSDP, "train__precision": "bf16"}, 2, {"train__precision": "bf16"}, 2e-2),
    "fp16": ({**FSDP, "train__precision": "fp16"}, 2, {"train__precision": "fp16"}, 1e-2),
    "lora in bf16": (
        {**FSDP, "train__precision": "bf16", "peft": {"method": "lora", "r": 4}},
        2,
        {"train__precision": "bf16", "peft": {"method": "lora", "r": 4}},
        2e-2,
    ),
    "8-bit state": (
        {**FSDP, "optim__optimizer": "adamw8bit"},
        2,
        {"optim__optimizer": "adamw8bit"},
        5e-2,
    ),
}


LONGER = CASES.keys() - {"offloaded"}


def write(folder: Path, name: str, workers: int, **changes: Any) -> Path:
    peft = changes.pop("peft", {})
    changes |= {f"peft__{key}": value for key, value in peft.items()}
    settings = {"data__lanes": 4, "parallel__workers": workers, "checkpoint__every": 5, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(tiny(folder, name, **settings)))
    return path


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) if case in LONGER else case for case in CASES],
)
def test_fsdp_with_everything_trains_as_one_process_and_resumes_exactly(
    case: str, tmp_path: Path
) -> None:
    settings, size, alone, tolerance = CASES[case]
    if "adamw8bit" in settings.values():
        pytest.importorskip("torchao")
    paths = [write(tmp_path, name, size, **settings) for name in ("whole", "again_left")]
    reference = write(tmp_path, "reference", 1, **alone)
    assert worlds.run(1, reference, module="tests.support.matrix") == 0
    assert worlds.run(size, *paths, kill_at=8, module="tests.support.matrix") == 0
    found = {
        name: [line["loss"] for line in read_lines(tmp_path / "runs" / name / "metrics.jsonl")]
        for name in ("reference", "whole", "again_left")
    }
    assert found["whole"] == pytest.approx(found["reference"], rel=tolerance)
    assert found["again_left"] == found["whole"]
    assert found["whole"][-1] < found["whole"][0]


def test_bf16_is_refused_on_a_gpu_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is given here, of a GPU that this machine does not have."""
    monkeypatch.setattr(make, "has_bf16", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    config = Config.model_validate({"train": {"precision": "bf16"}})
    world = World(0, 1, torch.device("cuda"))
    with pytest.raises(UserError, match=r"train\.precision: bf16, but Tesla T4 has none; use fp16"):
        make_strategy(config, torch.nn.Linear(1, 1), world)
