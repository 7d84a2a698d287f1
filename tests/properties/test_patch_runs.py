"""Runs of patch_lm, of all its tasks in one step: the same gradient and losses under every strategy
and number of workers, and killed and gone on with to the last bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from raysft.export import export_run
from tests.support import patches, worlds
from tests.support.compared import MATRIX, goes_on, gradient, same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS = 8
LORA = {"method": "lora", "r": 2, "target_modules": ["q_proj", "to_q", "to_v"]}


def write(folder: Path, name: str, strategy: str, **sections: dict[str, Any]) -> Path:
    """The config file of a run."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "data": {
            "train": [{"path": str(patches.corpus(folder / "corpus"))}],
            "lanes": 3,
            "window": 24,
            "tokens_per_batch": 260,
            "prompts": {"asr": "-", "tts": "-"},
        },
        "model": patches.model(),
        "parallel": {"strategy": strategy, "device": "cpu"},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": STEPS, "precision": "fp32"},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 4},
    }
    for section, keys in sections.items():
        tree.setdefault(section, {}).update(keys)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("packed", 2),
        pytest.param("packed", 3, marks=pytest.mark.slow),
        pytest.param("padded", 2, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_one_process(mode: str, size: int, tmp_path: Path) -> None:
    one = write(tmp_path, "one", "ddp", data={"mode": mode})
    others = [write(tmp_path, s, s, data={"mode": mode}) for s in ("ddp", "fsdp", "zero2")]
    assert worlds.run(1, one, kill_at=-1, module=MATRIX) == 0
    assert worlds.run(size, *others, kill_at=-1, module=MATRIX) == 0
    expected = gradient(tmp_path, "one")
    trained = {name.split(".")[1] for name in expected}
    assert trained == {"language_model", "pooling", "flow_head", "stop_head"}
    assert sum(value.abs().max() > 1e-3 for value in expected.values()) > 0.8 * len(expected)
    for strategy in ("ddp", "fsdp", "zero2"):
        same(gradient(tmp_path, strategy), expected)


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
    first = goes_on(tmp_path, one, *two, STEPS)
    export_run(tmp_path / "runs" / "whole", tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in exported.items():
        assert torch.equal(first[f"lm.{name}"], value), name


@pytest.mark.slow
def test_adapters_train_on_language_model_and_flow_head(tmp_path: Path) -> None:
    one = write(tmp_path, "one", "ddp", peft=LORA)
    two = [write(tmp_path, s, s, peft=LORA) for s in ("ddp", "fsdp")]
    assert worlds.run(1, one, kill_at=-1, module=MATRIX) == 0
    assert worlds.run(2, *two, kill_at=-1, module=MATRIX) == 0
    expected = gradient(tmp_path, "one")
    parts = {"lora", "trainable_tokens"}  # the second: rows of the markers, which are new
    assert {next((p for p in parts if p in name), name) for name in expected} == parts
    assert any("flow_head" in name and "to_v" in name for name in expected)
    for strategy in ("ddp", "fsdp"):
        same(gradient(tmp_path, strategy), expected)
