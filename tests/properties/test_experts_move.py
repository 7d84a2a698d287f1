"""After 20 steps every expert that received a token has changed, no other one, and nothing frozen.

Two gloo processes. Who received a token is what the run itself has counted (experts.jsonl). What
has changed is told from the weights that the run began with and those that it exports, both read
by transformers, and in the workers' memory (moved.json). One kind of token, which the corpus lacks,
leaves one expert of each layer without any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from raysft.config import Config, load_config
from raysft.data.encode import make_encoder
from raysft.export import export, export_run
from raysft.models import build
from raysft.run.catalogue import Catalogue
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from raysft.worker import build_model
from tests.properties.test_experts import exported, mixture, train, write

STEPS, EXPERTS, LAYERS, IDLE = 20, 8, 3, 7
FROZEN = ["*.self_attn.*", "*.gate.weight", "*.layers.1.mlp.experts.*"]
GROUPS: dict[str, Any] = {
    "text": {"ids": ["0-127", "256-258"], "experts": "0-3"},
    "audio": {"ids": "259-278", "experts": "4-6"},
    "never": {"ids": "128-255", "experts": IDLE, "top_k": 1},  # bytes of no letter
}
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3", "ep")
CASES = [
    pytest.param(
        strategy, method, marks=[] if (strategy, method) == ("ep", "none") else pytest.mark.slow
    )
    for method in ("none", "lora")
    for strategy in STRATEGIES
]


def corpus(folder: Path) -> Path:
    """Items of asr and tts in turn, so that tokens of both kinds are supervised."""
    items = []
    for number in range(60):
        pair = (f"[Hu{number % 20}]" * (1 + number % 7), f"text {number}")
        source, target = pair if number % 2 else pair[::-1]
        items.append({"id": f"u{number}", "instruction": "Go.", "input": source, "output": target})
    path = folder / "both.json"
    path.write_text(json.dumps(items))
    return path


def received(run: Path) -> torch.Tensor:
    """Tokens that went to each expert over the whole run: [layers, experts]."""
    lines = read_lines(run / "experts.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = [f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS)]
    assert all(line["layers"] == names for line in lines)
    return torch.tensor(np.sum([list(line["tokens"].values()) for line in lines], axis=(0, 1)))


def by_expert(files: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What peft's file has of the experts, with these first."""
    found = {}
    for name, weight in files.items():
        if ".experts." in name:
            a = "lora_A" in name  # [E r, in] expert by expert; B [out, r E], experts innermost
            split = weight.unflatten(0, (EXPERTS, -1)) if a else weight.unflatten(1, (-1, EXPERTS))
            found[name] = split if a else split.permute(2, 0, 1)
    return found


def adapters_at_first(path: Path) -> dict[str, torch.Tensor]:
    """As every worker makes them, by the run's seed."""
    config = load_config(path)
    encoder = make_encoder(config.model, config.data, path.parent)
    model, adapters = build_model(config, encoder, STEPS)
    assert adapters is not None
    files = adapters.files(dict(model.model.named_parameters()))
    return by_expert(load(files["adapter/adapter_model.safetensors"]))


def changed(before: torch.Tensor, after: torch.Tensor) -> list[bool]:
    """By expert."""
    assert before.shape == after.shape and len(before) == EXPERTS
    return (before != after).flatten(1).any(1).tolist()


@pytest.mark.parametrize(("strategy", "method"), CASES)
def test_experts_that_received_a_token_have_changed_and_nothing_else(
    strategy: str, method: str, tmp_path: Path
) -> None:
    base, run = tmp_path / "base", tmp_path / "runs" / "run"
    config = Config.model_validate({"model": mixture()})
    encoder = make_encoder(config.model, config.data, tmp_path)
    export(build(config.model, config.data, encoder, 1), base)
    full = {"train__freeze": FROZEN}
    lora: dict[str, Any] = {"peft__method": "lora", "peft__r": 8, "peft__experts": True}
    lora["peft__target_modules"] = ["q_proj", "v_proj"]
    settings = {
        "model": {**exported(base), "moe": {"modality": {"groups": GROUPS}}},
        "data__train": [{"path": str(corpus(tmp_path))}],
        "train__max_steps": STEPS,
        "checkpoint__every": 0,
        **(full if method == "none" else lora),
    }
    path = write(tmp_path, "run", **settings, parallel={"strategy": strategy})
    train(2, path)

    had = (received(run) > 0).tolist()
    assert all(layer[:IDLE] == [True] * IDLE and not layer[IDLE] for layer in had), had
    export_run(run, tmp_path / "out", merge=method == "lora")
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (base, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for layer in range(LAYERS):
        trains = method == "lora" or layer != 1
        for matrix in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{matrix}"
            found = changed(before.pop(name), after[name])
            assert found == (had[layer] if trains else [False] * EXPERTS), name
    moved = json.loads((run / "moved.json").read_text())
    assert {each["moved"] for each in moved.values() if each["trains"]} == {True}
    assert {each["moved"] for each in moved.values() if not each["trains"]} == {False}
    for name, weight in before.items():
        if method == "lora":
            trains = "q_proj" in name or "v_proj" in name
        else:
            trains = ".self_attn." not in name and not name.endswith(".gate.weight")
        assert torch.equal(weight, after[name]) != trains, name
    if method == "lora":
        (saved,) = Catalogue.of(read_config(run).checkpoint, run).committed()
        last = by_expert(load(saved.read("adapter/adapter_model.safetensors")))
        assert len(last) == 4 * LAYERS
        for name, weight in adapters_at_first(path).items():
            layer = int(name.split(".layers.")[1].split(".")[0])
            assert changed(weight, last[name]) == had[layer], name
