"""Runs of flow decoders: the same gradient and losses under every strategy and number of workers,
and killed and gone on with to the last bit.

Three lanes, so that with two workers one has a turn of weight zero. Encoder, token table and
projection are frozen in some, as Step-Audio publishes its training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel

from raysft.export import export_run
from tests.support import flows, worlds
from tests.support.compared import MATRIX, goes_on, gradient, losses, same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS = 8
FROZEN = ["encoder.*", "input_embedding.*", "encoder_proj.*"]


def write(folder: Path, kind: str, name: str, strategy: str, **sections: dict[str, Any]) -> Path:
    """The config file of a run."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "data": {
            "train": [{"path": str(flows.corpus(folder / kind, kind))}],
            "mode": "padded",
            "lanes": 3,
            "window": 24,
            "tokens_per_batch": 100,
        },
        "model": {"path": str(flows.base(folder, kind))},
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
    ("kind", "freeze", "size"),
    [
        pytest.param("dit", FROZEN, 2, id="frozen-2"),
        pytest.param("dit", FROZEN, 3, id="frozen-3", marks=pytest.mark.slow),
        pytest.param("dit", [], 2, id="whole-2", marks=pytest.mark.slow),
        pytest.param("dit", [], 3, id="whole-3", marks=pytest.mark.slow),
        pytest.param("voicebox", [], 2, id="voicebox-2", marks=pytest.mark.slow),
        pytest.param("voicebox", [], 3, id="voicebox-3", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_one_process(
    kind: str, freeze: list[str], size: int, tmp_path: Path
) -> None:
    train = {"freeze": freeze}
    one = write(tmp_path, kind, "one", "ddp", train=train)
    others = [write(tmp_path, kind, s, s, train=train) for s in ("ddp", "fsdp", "zero2")]
    assert worlds.run(1, one, kill_at=-1, module=MATRIX) == 0
    assert worlds.run(size, *others, kill_at=-1, module=MATRIX) == 0
    expected = gradient(tmp_path, "one")
    trained = {name.split(".")[1] for name in expected}
    assert trained >= ({"decoder"} if freeze or kind == "voicebox" else {"decoder", "encoder"})
    if freeze:
        assert trained == {"decoder", "spk_embed_affine_layer"}
    assert sum(value.abs().max() > 1e-3 for value in expected.values()) > 0.8 * len(expected)
    for strategy in ("ddp", "fsdp", "zero2"):
        same(gradient(tmp_path, strategy), expected)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("dit", "ddp"),
        pytest.param("dit", "fsdp", marks=pytest.mark.slow),
        pytest.param("dit", "zero2", marks=pytest.mark.slow),
        pytest.param("voicebox", "ddp", marks=pytest.mark.slow),
        pytest.param("voicebox", "fsdp", marks=pytest.mark.slow),
        pytest.param("voicebox", "zero2", marks=pytest.mark.slow),
    ],
)
def test_runs_go_on_to_the_last_bit(kind: str, strategy: str, tmp_path: Path) -> None:
    one = write(tmp_path, kind, "one", "ddp")
    two = [write(tmp_path, kind, name, strategy) for name in ("whole", "again_whole")]
    first = goes_on(tmp_path, one, *two, STEPS)
    export_run(tmp_path / "runs" / "whole", tmp_path / "out")
    exported = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    for name, value in exported.items():
        assert torch.equal(first[f"lm.{name}"], value), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_adapters_train_alone(strategy: str, tmp_path: Path) -> None:
    peft = {"method": "lora", "r": 2, "alpha": 4}
    one = write(tmp_path, "dit", "one", "ddp", peft=peft)
    two = write(tmp_path, "dit", "two", strategy, peft=peft)
    assert worlds.run(1, one, module=MATRIX) == 0
    assert worlds.run(2, two, module=MATRIX) == 0
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-4)
    export_run(tmp_path / "runs" / "two", tmp_path / "merged", merge=True)
    assert AutoModel.from_pretrained(tmp_path / "merged").config.codebooks == [5, 9]
