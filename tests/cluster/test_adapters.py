"""As a user does it: adapters on a base, with a token budget found by itself; evaluated, and
exported as an adapter and as a merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raysft.audit import audit
from raysft.config import Config
from raysft.data.encode import make_encoder
from raysft.export import export
from raysft.models import build
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from tests.support import jobs
from tests.support.models import CAUSAL

pytestmark = [pytest.mark.usefixtures("joined"), pytest.mark.timeout(600)]
UNITS = 20
LORA = "peft={method: lora, r: 4, target_modules: [q_proj, v_proj]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds lora.yaml and its base."""
    folder = tmp_path_factory.mktemp("adapters")
    items = [
        {"id": f"u{i}", "input": f"[Hu{i % UNITS}]" * (1 + i % 7), "output": f"text {i}"}
        for i in range(80)
    ]
    (folder / "units.json").write_text(json.dumps(items))
    config = Config.model_validate({"model": {**CAUSAL, "speech_units": UNITS}})
    encoder = make_encoder(config.model, config.data, folder)
    export(build(config.model, config.data, encoder, 0), folder / "base")
    source = {"path": str(folder / "units.json"), "name": "heard"}
    tree = {
        "run": {"storage_path": str(folder / "runs")},
        "data": {"train": [source], "eval": [source], "lanes": 3},
        "model": {"path": str(folder / "base"), "speech_units": UNITS},
        "optim": {"lr": 3e-3},
        "log": {"every": 1, "tensorboard": False},
        "evaluate": {"max_new_tokens": 4},
    }
    (folder / "lora.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.mark.slow
def test_lora_with_a_budget_found_by_itself_is_exported_as_plain_peft_takes_it(
    folder: Path, tmp_path: Path
) -> None:
    fsdp = "parallel={strategy: fsdp, workers: 2, memory_gb: 3}"
    run = trained(folder, "lora", fsdp, steps=4)
    budget = read_config(run).data.tokens_per_batch
    assert isinstance(budget, int) and budget % 64 == 0
    lines = read_lines(run / "metrics.jsonl")
    assert lines[-1]["world_size"] == 2 and lines[-1]["peak_memory_gb"] < 3
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "wer/heard" in read_lines(run / "eval.jsonl")[-1]
    assert audit(run).clean
    done = jobs.call("export", run, tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    joined = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    merged = merge(run, tmp_path)
    assert merged.keys() == joined.keys()
    assert all(merged[name].allclose(joined[name], atol=1e-6) for name in merged)


@pytest.mark.slow
def test_a_budget_that_was_found_stays_when_another_strategy_goes_on(folder: Path) -> None:
    fsdp = "parallel={strategy: fsdp, workers: 2, memory_gb: 3}"
    run = trained(folder, "then_zero", fsdp, "evaluate.at_end=false", steps=3)
    budget = read_config(run).data.tokens_per_batch
    trained(folder, "then_zero", "parallel={strategy: zero2, workers: 1, memory_gb: 3}", steps=6)
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert read_config(run).data.tokens_per_batch == budget, "auto again: what the run has"
    assert audit(run).clean


def trained(folder: Path, name: str, *words: str, steps: int) -> Path:
    """The run of that name, trained to `steps`."""
    auto = (f"run.name={name}", LORA, "data.tokens_per_batch=auto", f"train.max_steps={steps}")
    done = jobs.call("sft", folder / "lora.yaml", *auto, *words)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / name


def merge(run: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The run's weights, exported as a model without adapters."""
    done = jobs.call("export", run, tmp_path / "merged", "--merge")
    assert done.returncode == 0, done.stderr
    return AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()


def test_targets_that_match_nothing_are_told_before_ray_starts(folder: Path) -> None:
    wrong = "peft={method: lora, target_modules: [q_prj]}"
    done = jobs.call("sft", folder / "lora.yaml", "run.name=wrong", wrong)
    assert done.returncode == 1
    assert "peft.target_modules: q_prj matches no layer" in done.stderr and "q_proj" in done.stderr
    assert not (folder / "runs" / "wrong").exists()
