"""Population based training under Ray Tune: the worst go on from the best, whatever dies."""

from __future__ import annotations

import csv
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.audit import audit
from raysft.run.lines import read_lines
from raysft.sweep.folder import SweepFolder
from raysft.sweep.population import NAME, Population
from tests.support import jobs
from tests.support.models import CAUSAL
from tests.support.swept import write_texts

pytestmark = [pytest.mark.usefixtures("joined"), pytest.mark.timeout(1500), pytest.mark.slow]
STEPS, EVERY = 6, 2
BAD = 1e-7  # a rate that learns nothing


def written(folder: Path) -> Path:
    """The config of a sweep of a small text model."""
    write_texts(folder)
    tree: dict[str, Any] = {
        "run": {"name": "population", "storage_path": str(folder / "runs")},
        "data": {
            "train": [str(folder / "train.jsonl")],
            "eval": [{"path": str(folder / "dev.jsonl"), "name": "dev"}],
            "lanes": 2,
            "tokens_per_batch": 128,
        },
        "model": CAUSAL,
        "parallel": {"backoff_s": 0.0},
        "optim": {"schedule": "cosine", "warmup": 1},
        "train": {"max_steps": STEPS},
        "evaluate": {"every": EVERY, "generate": False},
        "checkpoint": {"every": 0, "keep": 10},
        "log": {"every": 1, "tensorboard": False},
        "sweep": {
            "space": {"optim.lr": [BAD, 2 * BAD, 3e-3, 1e-2]},
            "metric": "loss",
            "scheduler": "pbt",
            "quantile": 0.5,
        },
    }
    path = folder / "population.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(run: Path) -> dict[int, Any]:
    return {line["step"]: line["loss"] for line in read_lines(run / "metrics.jsonl")}


def test_the_worst_go_on_from_the_best_to_the_last_digit_though_the_sweep_is_killed(
    tmp_path: Path,
) -> None:
    config = written(tmp_path)
    folder = tmp_path / "runs" / "population"
    sweep = SweepFolder(folder)
    first = jobs.start("sweep", config)
    end = time.monotonic() + 600
    while not (folder / NAME).is_file():
        assert first.poll() is None and time.monotonic() < end, first.communicate()
        time.sleep(0.05)
    first.kill()  # in the middle of what follows from the first comparison, or just after it
    first.wait()
    begun = read_lines(folder / NAME)
    done = jobs.call("sweep", config)
    assert done.returncode == 0, done.stderr

    lines = read_lines(folder / NAME)
    assert lines[: len(begun)] == begun
    assert [(line["step"], "done" in line) for line in lines] == [
        (step, done) for step in range(EVERY, STEPS, EVERY) for done in (False, True)
    ], "each comparison is made once"
    takeovers = Population(sweep).takeovers()
    assert {one.trial for one in takeovers if one.step == EVERY} == {0, 1}
    assert {one.donor for one in takeovers if one.step == EVERY} <= {2, 3}

    trials = {trial.number: trial for trial in sweep.trials()}
    assert len(trials) == 4
    for trial in trials.values():
        run = sweep.run(trial)
        assert sweep.state(trial).status == "finished"
        assert audit(run, sample=4).clean
        assert sorted(losses(run)) == list(range(1, STEPS + 1))

    one = next(one for one in takeovers if one.step == EVERY and one.trial == 0)
    until = min([o.step for o in takeovers if o.trial == 0 and o.step > EVERY], default=STEPS)
    alone = tmp_path / "alone" / "again"
    shutil.copytree(sweep.run(trials[one.donor]), alone)
    for step in range(EVERY + EVERY, STEPS + 1, EVERY):
        shutil.rmtree(alone / "checkpoints" / f"step_{step}")
    tree = yaml.safe_load((alone / "config.yaml").read_text())
    tree["optim"]["lr"] = one.point["optim.lr"]  # which a run that goes on may not change itself
    tree["run"].update(name="again", storage_path=str(tmp_path / "alone"))
    (alone / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    plain = tmp_path / "again.yaml"
    plain.write_text(yaml.safe_dump({k: v for k, v in tree.items() if k not in _BESIDE}))
    done = jobs.call("sft", plain)
    assert done.returncode == 0, done.stderr
    ours, plain_losses = losses(sweep.run(trials[0])), losses(alone)
    assert until > EVERY
    for step in range(EVERY + 1, until + 1):
        assert ours[step] == plain_losses[step]
    assert ours[EVERY] != plain_losses[EVERY], "until then it was a run of its own"

    with open(folder / "results.csv", newline="") as text:
        rows = {row["trial"]: row for row in csv.DictReader(text)}
    row = rows[trials[0].name]
    last = Population(sweep).point(trials[0])
    assert float(row["optim.lr"]) == last["optim.lr"]
    assert f"step {EVERY} from {trials[one.donor].name}" in row["taken_over"]


_BESIDE = ("versions", "id", "base")
