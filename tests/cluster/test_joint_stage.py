"""A language model, a flow decoder, then both in one training: by one command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from raysft.audit import audit
from raysft.run.lines import read_lines
from tests.support import jobs, pairs

pytestmark = [pytest.mark.usefixtures("joined"), pytest.mark.timeout(900), pytest.mark.slow]
STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    source = {"path": str(pairs.corpus(folder)), "task": "tts"}
    tree: dict[str, Any] = {
        "run": {"name": "voice", "storage_path": str(folder / "runs")},
        "data": {
            "train": [source],
            "eval": [{**source, "name": "dev"}],
            "speech_tokens": {"clusters": pairs.UNITS},
            "mode": "padded",
            "lanes": 2,
            "tokens_per_batch": 1200,
        },
        "parallel": {"backoff_s": 0.0},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": STEPS},
        "evaluate": {"every": 2, "generate": False},
        "checkpoint": {"every": 2},
        "log": {"every": 1, "tensorboard": False},
        "stages": [
            {"name": "llm", "model": pairs.llm()},
            {"name": "flow", "model": pairs.flow()},
            {
                "name": "joint",
                "model": {"pair": {"llm": "stages.llm", "flow": "stages.flow"}},
                "optim": {"lr": 1e-4},
            },
        ],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def test_the_joint_stage_begins_with_both_and_weighs_their_losses(config: Path) -> None:
    """Also killed before its end, and never with other weights than it began with."""
    done = jobs.call("sft", config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "stage joint; here with the model" in done.stdout
    folder = config.parent / "runs" / "voice"
    assert not folder.exists()
    job = jobs.start("sft", config, "stages.joint.train.max_steps=6")
    jobs.wait_for_step(job, folder / "joint", 3)
    job.kill()
    job.wait()
    done = jobs.call("sft", config)
    assert done.returncode == 0, done.stderr
    assert "stage flow is finished" in done.stdout
    started, parts = weights(folder / "joint_start"), {}
    for name in ("llm", "flow"):
        best = weights(folder / f"{name}_best")
        parts |= {f"{name}.{key}": value for key, value in best.items()}
    assert started.keys() == parts.keys()
    assert all(torch.equal(started[key], value) for key, value in parts.items())
    run = folder / "joint"
    assert audit(run).clean
    for line in read_lines(run / "metrics.jsonl"):
        expected = 0.4 * line["term/cross_entropy"] + 0.6 * line["term/flow"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    trained = weights(folder / "joint_best")
    moved = {name: not torch.equal(trained[name], started[name]) for name in started}
    assert any(moved[name] for name in moved if name.startswith("llm."))
    assert any(moved[name] for name in moved if name.startswith("flow."))
    assert (folder / "speech_tokens.safetensors").is_file(), "fitted once for all"
    changed = "stages.joint.model.pair.llm_weight=0.5"
    done = jobs.call("sft", config, changed)
    assert done.returncode == 1
    assert "stage joint: model.pair: joint began with" in done.stderr
    shutil.rmtree(folder / "joint_start")
    done = jobs.call("sft", config)
    assert done.returncode == 0, done.stderr
    assert "stage joint is finished" in done.stdout and not (folder / "joint_start").exists()
