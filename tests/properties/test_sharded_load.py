"""A model that is read when it is sharded trains as one that every worker has read whole.

Its vocabulary grows by 20 units, so that new rows are made of those in the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from raysft.config import to_yaml
from raysft.data.tokenizer import byte_tokenizer
from raysft.run.lines import read_lines
from tests.support import worlds
from tests.support.mixtures import MIXTURES
from tests.support.model_zoo import CONFIGS
from tests.support.worlds import tiny

LORA: dict[str, Any] = {"method": "lora", "r": 4, "dropout": 0.1}
TABLES = {"modules_to_save": ["embed_tokens", "lm_head"]}
KINDS = {
    "groups": {
        "text": {"ids": "0-258", "experts": "0-3"},
        "units": {"ids": "259-278", "experts": "4-7"},
    }
}
CASES: dict[str, tuple[str, int, dict[str, dict[str, Any]]]] = {
    "fsdp": ("llama", 2, {"parallel": {"strategy": "fsdp"}}),
    "fsdp lora": ("llama", 2, {"parallel": {"strategy": "fsdp"}, "peft": LORA}),
    "zero3": ("llama", 2, {"parallel": {"strategy": "zero3"}}),
    "ep": ("qwen3_moe", 2, {"parallel": {"strategy": "ep", "ep_size": 2}}),
}
SLOW: dict[str, tuple[str, int, dict[str, dict[str, Any]]]] = {
    "fsdp, 3 workers": ("llama", 3, {"parallel": {"strategy": "fsdp"}}),
    "fsdp, one worker": ("llama", 1, {"parallel": {"strategy": "fsdp"}}),
    "fsdp, tied": ("tied", 2, {"parallel": {"strategy": "fsdp"}}),
    "fsdp, two copies": ("llama", 4, {"parallel": {"strategy": "fsdp", "replicate": 2}}),
    "fsdp bf16": ("llama", 2, {"parallel": {"strategy": "fsdp"}, "train": {"precision": "bf16"}}),
    "fsdp lora bf16": (
        "llama",
        2,
        {"parallel": {"strategy": "fsdp"}, "peft": LORA, "train": {"precision": "bf16"}},
    ),
    "fsdp lora, tables whole": (
        "llama",
        2,
        {"parallel": {"strategy": "fsdp"}, "peft": {**LORA, **TABLES}},
    ),
    "fsdp ia3": (
        "llama",
        2,
        {"parallel": {"strategy": "fsdp"}, "peft": {"method": "ia3"} | TABLES},
    ),
    "fsdp adalora": (
        "llama",
        2,
        {"parallel": {"strategy": "fsdp"}, "peft": {"method": "adalora"}},
    ),
    "fsdp dora": ("llama", 2, {"parallel": {"strategy": "fsdp"}, "peft": {**LORA, "dora": True}}),
    "fsdp, frozen": (
        "llama",
        2,
        {"parallel": {"strategy": "fsdp"}, "train": {"freeze": ["*layers.0.*"]}},
    ),
    "fsdp, mixture": ("qwen3_moe", 2, {"parallel": {"strategy": "fsdp"}}),
    "fsdp, mixture lora": (
        "qwen3_moe",
        2,
        {"parallel": {"strategy": "fsdp"}, "peft": {**LORA, "r": 8, "experts": True}},
    ),
    "fsdp, kinds": (
        "qwen3_moe",
        2,
        {
            "parallel": {"strategy": "fsdp"},
            "model": {"moe": {"modality": KINDS, "balance": 0.01}},
        },
    ),
    "zero3 lora": ("llama", 2, {"parallel": {"strategy": "zero3"}, "peft": LORA}),
    "zero3 lora bf16": (
        "llama",
        2,
        {"parallel": {"strategy": "zero3"}, "peft": LORA, "train": {"precision": "bf16"}},
    ),
    "zero3 bf16": ("llama", 2, {"parallel": {"strategy": "zero3"}, "train": {"precision": "bf16"}}),
    "zero3, tied": ("tied", 2, {"parallel": {"strategy": "zero3"}}),
    "zero3, mixture": ("qwen3_moe", 2, {"parallel": {"strategy": "zero3"}}),
    "ep, 4 workers": ("qwen3_moe", 4, {"parallel": {"strategy": "ep", "ep_size": 2}}),
    "ep, deepseek": ("deepseek_v2", 2, {"parallel": {"strategy": "ep", "ep_size": 2}}),
    "ep lora": (
        "qwen3_moe",
        2,
        {"parallel": {"strategy": "ep", "ep_size": 2}, "peft": {**LORA, "r": 8, "experts": True}},
    ),
}


def base(folder: Path, kind: str) -> Path:
    """A checkpoint of several files."""
    settings = {
        "llama": CONFIGS["llama"],
        "tied": {**CONFIGS["llama"], "tie_word_embeddings": True},
    }.get(kind) or {**MIXTURES[kind], "model_type": kind}
    tokenizer = byte_tokenizer()
    settings = {**settings, "vocab_size": len(tokenizer), "pad_token_id": None}
    settings |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    place = folder / kind
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    net.save_pretrained(place, max_shard_size="20KB")
    tokenizer.save_pretrained(place)
    return place


def curve(
    folder: Path, name: str, size: int, place: Path, sections: dict[str, Any], module: str
) -> list[tuple[float, float]]:
    """Loss and norm of each step."""
    model = {"path": str(place), "config": None, "tokenizer": None, "speech_units": 20}
    changes: dict[str, Any] = {f"model__{key}": value for key, value in model.items()}
    for section, keys in sections.items():
        changes |= {f"{section}__{key}": value for key, value in keys.items()}
    changes = {"data__lanes": 4, "train__max_steps": 4, "checkpoint__every": 4, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(tiny(folder, name, **changes)))
    assert worlds.run(size, path, module=module) == 0
    lines = read_lines(folder / "runs" / name / "metrics.jsonl")
    assert len(lines) == 4
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == "fsdp" else pytest.mark.slow) for case in CASES | SLOW],
)
def test_a_model_that_is_read_when_it_is_sharded_trains_as_one_read_whole(
    case: str, tmp_path: Path
) -> None:
    kind, size, sections = (CASES | SLOW)[case]
    place = base(tmp_path, kind)
    own = curve(tmp_path, "later", size, place, sections, "tests.support.worlds")
    whole = curve(tmp_path, "whole", size, place, sections, "tests.support.read_whole")
    for ours, theirs in zip(own, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
