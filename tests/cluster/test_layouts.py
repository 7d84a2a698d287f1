"""Every layout of data trains and evaluates by the same command; a preparation's shards do too."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raysft.run.lines import read_lines
from tests.support import jobs
from tests.support.layouts import LAYOUTS, corpus
from tests.support.models import AUDIO

pytestmark = pytest.mark.usefixtures("joined")


def test_every_layout_trains_and_evaluates_in_one_run(tmp_path: Path) -> None:
    us = corpus(5)
    train, evaluated = [], []
    for name, layout in LAYOUTS.items():
        path = layout.write(tmp_path / "data" / name, us)
        train.append({"path": str(path), "name": name, **layout.entry})
        split = path / "wav" / "train" if name == "aishell" else path  # it has no test split
        evaluated.append({**train[-1], "path": str(split)})
    tree = {
        "run": {"name": "run", "storage_path": str(tmp_path / "runs")},
        "data": {"train": train, "eval": evaluated, "lanes": 2, "tokens_per_batch": 400},
        "model": dict(AUDIO),
        "train": {"max_steps": 3},
        "log": {"every": 1},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = jobs.call("sft", config)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "run"
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3]
    (figures,) = read_lines(run / "eval.jsonl")
    assert {f"wer/{name}" for name in LAYOUTS} <= figures.keys()
    # GigaSpeech's segment of silence alone is none.
    left = [line["source"] for line in read_lines(run / "quarantine.jsonl")]
    assert set(left) == {"gigaspeech"}
