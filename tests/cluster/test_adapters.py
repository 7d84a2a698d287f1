"""As a user does it: adapters on a base, under fsdp and then ZeRO, with a token budget found by
itself; evaluated, and exported as an adapter and as a merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raysft.audit import audit
from raysft.config import Config
from raysft.data.encode import make_encoder
from raysft.export import export
from raysft.models import build
from raysft.rundir import read_config
from raysft.train.metrics import read_lines
from tests.cluster import jobs
from tests.models import CAUSAL

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


def test_lora_with_a_budget_found_by_itself_under_fsdp_then_zero(
    folder: Path, tmp_path: Path
) -> None:
    words = [folder / "lora.yaml", "run.name=lora", LORA, "data.tokens_per_batch=auto"]
    fsdp = "parallel={strategy: fsdp, workers: 2, memory_gb: 3}"
    done = jobs.call("sft", *words, fsdp, "train.max_steps=3", "evaluate.at_end=false")
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "lora"
    budget = read_config(run).data.tokens_per_batch
    assert isinstance(budget, int) and budget % 64 == 0
    lines = read_lines(run / "metrics.jsonl")
    assert lines[-1]["world_size"] == 2 and lines[-1]["peak_memory_gb"] < 3
    zero = "parallel={strategy: zero2, workers: 1, memory_gb: 3}"
    done = jobs.call("sft", *words, zero, "train.max_steps=6")
    assert done.returncode == 0, done.stderr
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "wer/heard" in read_lines(run / "eval.jsonl")[-1]
    assert read_config(run).data.tokens_per_batch == budget, "auto again: what the run has"
    assert audit(run).clean
    for name, more in (("adapter", []), ("merged", ["--merge"])):
        done = jobs.call("export", run, tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    joined = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    assert merged.keys() == joined.keys()
    assert all(merged[name].allclose(joined[name], atol=1e-6) for name in merged)


def test_targets_that_match_nothing_are_told_before_ray_starts(folder: Path) -> None:
    wrong = "peft={method: lora, target_modules: [q_prj]}"
    done = jobs.call("sft", folder / "lora.yaml", "run.name=wrong", wrong)
    assert done.returncode == 1
    assert "peft.target_modules: q_prj matches no layer" in done.stderr and "q_proj" in done.stderr
    assert not (folder / "runs" / "wrong").exists()
