"""Plugins that lie in the folder of the command, in a run on a cluster: each process loads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.run.lines import read_lines
from tests.cluster.conftest import ROOT
from tests.support.models import CAUSAL

PLUGINS = ROOT / "tests" / "support" / "plugins"
COMMAND = "from raysft.command import run; run()"

pytestmark = pytest.mark.usefixtures("joined")


def raysft(*words: object) -> subprocess.CompletedProcess[str]:
    """What `raysft WORDS` does, in the folder of the plugins."""
    command = [sys.executable, "-c", COMMAND, *map(str, words)]
    return subprocess.run(command, cwd=PLUGINS, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [80, "auto"])
def test_a_run_of_nothing_but_plugins_trains_evaluates_audits_and_exports(
    budget: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    corpus = tmp_path / "corpus.jsonl"
    records = [{"said": f"text {n}", "units": [n % 20] * (1 + n % 7)} for n in range(40)]
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    tree: dict[str, Any] = {
        "plugins": ["my_lines", "my_family", "my_strategy", "my_loss", "my_metric"],
        "run": {"name": "run", "storage_path": str(tmp_path)},
        "data": {
            "train": [str(corpus)],
            "eval": [{"path": str(corpus), "name": "dev"}],
            "lanes": 2,
            "tokens_per_batch": budget,
        },
        "model": {**CAUSAL, "family": "my_family", "speech_units": 20},
        "parallel": {"strategy": "my_strategy"},
        "train": {"max_steps": 2, "losses": {"doubt": 0.1}},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"best": "exact/dev"},
        "evaluate": {"every": 1, "max_new_tokens": 2, "max_examples": 4},
    }
    if budget == "auto":
        tree["parallel"]["memory_gb"] = 3
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    done = raysft("sft", tmp_path / "mine.yaml")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "starting workers (my_strategy)" in done.stdout
    run = tmp_path / "run"
    lines = read_lines(run / "metrics.jsonl")
    assert len(lines) == 2 and all(0 < line["term/doubt"] < 1 for line in lines)
    *_, evaluation = read_lines(run / "eval.jsonl")
    assert 0 <= evaluation["exact/dev"] <= 1
    assert yaml.safe_load((run / "config.yaml").read_text())["plugins"] == tree["plugins"]

    done = raysft("audit", run, "--deep")
    assert done.returncode == 0, done.stdout + done.stderr
    done = raysft("export", run, tmp_path / "out", "--step", "best")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
