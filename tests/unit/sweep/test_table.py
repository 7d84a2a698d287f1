"""A sweep's table, from what its runs have written."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import yaml

from raysft.config import Config
from raysft.sweep import table
from raysft.sweep.folder import SweepFolder, seeded, trial_tree

METRIC = "wer/dev"


def make(folder: Path, seeds: int, *trials: tuple[str, dict[int, float]]) -> SweepFolder:
    """A sweep whose trials have these statuses and figures by step."""
    sweep = SweepFolder(folder)
    (folder / "trials").mkdir(parents=True)
    for number, (status, figures) in enumerate(trials):
        point: dict[str, Any] = {"optim.lr": 10.0 ** -(number // seeds)}
        trial = list(seeded(number // seeds, point, seeds, 7))[number % seeds]
        sweep.add(trial)
        sweep.set_state(trial, status=status, attempts=1, reason="why" * (status == "failed"))
        run = sweep.run(trial)
        run.mkdir()
        lines = [{"step": step, METRIC: value} for step, value in figures.items()]
        (run / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return sweep


def order(found: list[table.Row]) -> list[int]:
    return [row.trial.number for row in found]


def test_finished_trials_come_first_then_those_that_came_far(tmp_path: Path) -> None:
    sweep = make(
        tmp_path / "sweep",
        1,
        ("stopped", {2: 0.1}),
        ("finished", {2: 0.2, 4: 0.5}),
        ("finished", {4: 0.4}),
        ("failed", {}),
        ("stopped", {3: 0.9}),
        ("finished", {4: math.nan}),
    )
    found = table.rows(sweep, METRIC, "min")
    assert order(found) == [2, 1, 5, 4, 0, 3], "by the last figure; what is no number is the worst"
    assert [row.value for row in found[:3]] == [0.4, 0.5, None]
    best = table.best(found)
    assert best is not None and best.trial.number == 2
    assert order(table.rows(sweep, METRIC, "max"))[:2] == [1, 2]
    table.write_csv(tmp_path / "results.csv", found, METRIC)
    with open(tmp_path / "results.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["rank"] for row in rows] == list("123456")
    assert rows[0][METRIC] == "0.4" and rows[0]["optim.lr"] == "0.01" and rows[0]["seed"] == "7"
    assert rows[2][METRIC] == "" and rows[5]["reason"] == "why"


def test_points_with_several_seeds_are_ranked_by_their_mean(tmp_path: Path) -> None:
    """The single best trial is of the point that is worse on average."""
    sweep = make(
        tmp_path / "sweep",
        2,
        ("finished", {4: 0.1}),
        ("finished", {4: 0.9}),
        ("finished", {4: 0.3}),
        ("finished", {4: 0.4}),
    )
    found = table.rows(sweep, METRIC, "min")
    assert order(found) == [2, 3, 0, 1]
    assert [row.of_point for row in found] == [0.35, 0.35, 0.5, 0.5]
    assert [row.trial.seed for row in found] == [7, 8, 7, 8]


def test_a_sweep_where_nothing_finished_recommends_nothing(tmp_path: Path) -> None:
    sweep = make(tmp_path / "sweep", 1, ("stopped", {2: 0.1}), ("failed", {}))
    assert table.best(table.rows(sweep, METRIC, "min")) is None


def test_trials_are_a_group_for_loggers_and_the_best_one_is_a_run_of_its_own(
    tmp_path: Path,
) -> None:
    run = {"name": "mine", "storage_path": str(tmp_path)}
    base: dict[str, Any] = {"data": {"train": [{"path": "/a.jsonl"}]}, "model": {"path": "/m"}}
    config = Config.model_validate({**base, "run": run, "log": {"wandb": {"mode": "offline"}}})
    sweep = make(tmp_path / "mine", 1, ("finished", {2: 0.2}))
    (row,) = table.rows(sweep, METRIC, "min")
    tree = trial_tree(config, sweep, row.trial)
    assert tree["log"]["group"] == "mine" and tree["log"]["wandb"]["mode"] == "offline"
    (sweep.run(row.trial) / "config.yaml").write_text(yaml.safe_dump(base))
    table.write_best(tmp_path / "best.yaml", config, sweep, row)
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["log"]["group"] is None
    named = Config.model_validate({**base, "run": run, "log": {"group": "all"}})
    assert trial_tree(named, sweep, row.trial)["log"]["group"] == "all"
