"""As a user does it: train a base, export it, put adapters on it under fsdp and ZeRO with a token
budget that is found by itself, evaluate, export the adapter and the merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raysft.audit import audit
from raysft.rundir import read_config
from raysft.train.metrics import read_lines
from tests.cluster import jobs
from tests.models import CAUSAL

pytestmark = [pytest.mark.usefixtures("joined"), pytest.mark.timeout(600)]
UNITS = 20
LORA = "peft={method: lora, r: 4, target_modules: [q_proj, v_proj]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds base.yaml and lora.yaml, and the exported base of the first."""
    folder = tmp_path_factory.mktemp("adapters")
    items = [
        {"id": f"u{i}", "input": f"[Hu{i % UNITS}]" * (1 + i % 7), "output": f"text {i}"}
        for i in range(80)
    ]
    (folder / "units.json").write_text(json.dumps(items))
    tree = {
        "run": {"name": "base", "storage_path": str(folder / "runs")},
        "data": {"train": [str(folder / "units.json")], "lanes": 3, "tokens_per_batch": 120},
        "model": {**CAUSAL, "speech_units": UNITS},
        "optim": {"lr": 3e-3},
        "train": {"max_steps": 4},
        "log": {"every": 1, "tensorboard": False},
        "evaluate": {"max_new_tokens": 4, "max_examples": 8},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))
    done = jobs.call("sft", folder / "base.yaml")
    assert done.returncode == 0, done.stderr
    done = jobs.call("export", folder / "runs" / "base", folder / "base")
    assert done.returncode == 0, done.stderr
    tree["model"] = {"path": str(folder / "base"), "speech_units": UNITS}
    tree["data"]["eval"] = [{"path": str(folder / "units.json"), "name": "heard"}]
    (folder / "lora.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_lora_under_fsdp_with_a_budget_found_by_itself(folder: Path, tmp_path: Path) -> None:
    words = [
        folder / "lora.yaml",
        "run.name=lora",
        LORA,
        "parallel={strategy: fsdp, workers: 2, memory_gb: 3}",
        "data.tokens_per_batch=auto",
        "train.max_steps=3",
    ]
    done = jobs.call("sft", *words)
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "lora"
    budget = read_config(run).data.tokens_per_batch
    assert isinstance(budget, int) and budget % 64 == 0
    lines = read_lines(run / "metrics.jsonl")
    assert lines[-1]["world_size"] == 2 and lines[-1]["peak_memory_gb"] < 3
    again = jobs.call("sft", *words[:-1], "train.max_steps=6")
    assert again.returncode == 0, again.stderr
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == 6
    assert read_config(run).data.tokens_per_batch == budget, "auto again: what the run has"
    assert audit(run).clean
    done = jobs.call("evaluate", run)
    assert done.returncode == 0 and "wer/heard" in done.stdout + done.stderr, done.stderr
    for name, words in (("adapter", []), ("merged", ["--merge"])):
        done = jobs.call("export", run, tmp_path / name, *words)
        assert done.returncode == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    joined = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    assert merged.keys() == joined.keys()
    assert all(merged[name].allclose(joined[name], atol=1e-6) for name in merged)


def test_zero_under_ray_trains_what_ddp_trains(folder: Path) -> None:
    losses = {}
    for strategy, workers in (("ddp", 1), ("zero2", 2)):
        words = [f"run.name={strategy}", f"parallel={{strategy: {strategy}, workers: {workers}}}"]
        done = jobs.call("sft", folder / "lora.yaml", *words, "evaluate.at_end=false")
        assert done.returncode == 0, done.stderr
        lines = read_lines(folder / "runs" / strategy / "metrics.jsonl")
        losses[strategy] = [line["loss"] for line in lines]
    assert losses["zero2"] == pytest.approx(losses["ddp"], rel=1e-4)


def test_targets_that_match_nothing_are_told_before_ray_starts(folder: Path) -> None:
    wrong = "peft={method: lora, target_modules: [q_prj]}"
    done = jobs.call("sft", folder / "lora.yaml", "run.name=wrong", wrong)
    assert done.returncode == 1
    assert "peft.target_modules: q_prj matches no layer" in done.stderr and "q_proj" in done.stderr
    assert not (folder / "runs" / "wrong").exists()
