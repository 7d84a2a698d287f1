"""A mixture under `ep`: what one worker makes of it, whoever has the experts.

Four gloo processes and six lanes, so that in a step's second turn two of them have none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raysft.audit import audit
from raysft.config import to_yaml
from raysft.run.catalogue import Catalogue
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from raysft.train.checkpoint import read_weights
from tests.support import worlds
from tests.support.models import CAUSAL
from tests.support.worlds import tiny

STEPS = 10
_TEXT = CAUSAL["config"]
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16},
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "norm_topk_prob": False,
    },
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 8},
    "deepseek_v2": {
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "v_head_dim": 16,
        "head_dim": 8,
        "num_key_value_heads": 2,
        **_LATENT,
    },
}


def mixture(kind: str = "qwen3_moe", **more: Any) -> dict[str, Any]:
    """A model section of a small mixture, two experts a token."""
    settings = {**_TEXT, "num_experts_per_tok": 2, **MIXTURES[kind], "model_type": kind, **more}
    return {"tokenizer": "bytes", "speech_units": 20, "config": settings}


def write(folder: Path, name: str, **changes: Any) -> Path:
    """A config of six lanes; `parallel__workers` is the size of the group that runs it."""
    changes = {
        "model": None,
        "data__lanes": 6,
        "train__max_steps": STEPS,
        "optim__clip": 0.1,
        "optim__weight_decay": 0.0,
        "checkpoint__every": 4,
        **changes,
    }
    model = changes.pop("model") or mixture()
    for key, value in model.items():
        changes[f"model__{key}"] = value
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(tiny(folder, name, **changes)))
    return path


def train(size: int, *configs: Path, left_at: int = 0) -> None:
    assert worlds.run(size, *configs, kill_at=left_at, module="tests.support.matrix") == 0


def column(folder: Path, name: str, key: str) -> list[float]:
    return [line[key] for line in read_lines(folder / "runs" / name / "metrics.jsonl")]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Of its last checkpoint."""
    run = folder / "runs" / name
    saved, _ = Catalogue.of(read_config(run).checkpoint, run).newest()
    assert saved is not None
    return read_weights(saved)


def test_workers_that_share_experts_train_as_one(tmp_path: Path) -> None:
    evaluation = {
        "data__eval": [{"path": str(worlds.units(tmp_path))}],
        "evaluate__every": STEPS,
        "evaluate__max_examples": 10,
        "evaluate__max_new_tokens": 8,
    }
    one = write(tmp_path, "one", **evaluation)
    ep = {"parallel__strategy": "ep"}
    of_four = write(tmp_path, "of_four", **ep, **evaluation)
    again = write(tmp_path, "again_of_four", **ep, **evaluation)
    of_two = write(tmp_path, "of_two", **ep, parallel__ep_size=2, train__gradient_checkpointing=True)
    train(1, one)
    train(4, of_four, again, of_two, left_at=7)
    for name in ("of_four", "of_two"):
        for key, rel in (("loss", 1e-5), ("grad_norm", 1e-4)):
            expected = pytest.approx(column(tmp_path, "one", key), rel=rel)
            assert column(tmp_path, name, key) == expected, (name, key)
    for key in ("loss", "grad_norm"):
        assert column(tmp_path, "again_of_four", key) == column(tmp_path, "of_four", key)
    assert audit(tmp_path / "runs" / "again_of_four").clean
    assert measured(tmp_path, "of_four") == pytest.approx(measured(tmp_path, "one"), rel=1e-4)
    expected, found = weights(tmp_path, "one"), weights(tmp_path, "of_four")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    moved = json.loads((tmp_path / "runs" / "of_two" / "moved.json").read_text())
    assert all(each["moved"] for each in moved.values())


def measured(folder: Path, name: str) -> dict[str, float]:
    """What the last evaluation of a run says, but for times."""
    line = read_lines(folder / "runs" / name / "eval.jsonl")[-1]
    return {k: v for k, v in line.items() if isinstance(v, float) and "seconds" not in k}
