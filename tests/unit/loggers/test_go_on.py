"""Killed and gone on with: the same run of W&B and of MLflow, each step once, none missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from raysft.run.folder import run_folder
from raysft.run.lines import read_lines
from tests.support.logged import KILLED, SAVED, STEPS, config_of, trained
from tests.support.wandb_server import WandbServer

pytestmark = pytest.mark.slow  # two processes each, that load all there is
EVALUATIONS = [(3, 0), (6, 0), (9, 0), (12, 1)]


def killed_and_done(config: Any, environment: dict[str, str] | None = None) -> Path:
    """The folder of a run that was killed after KILLED, and has gone on from SAVED."""
    folder = run_folder(config)
    assert trained(config, killed=True, environment=environment) == -9
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")][-1] == KILLED
    assert trained(config, environment=environment) == 0
    events = read_lines(folder / "events.jsonl")
    (again,) = [line for line in events if line["event"] == "continued"]
    assert again["step"] == SAVED, "steps were trained again"
    assert not [line for line in events if "log." in str(line.get("reason"))]
    return folder


def check_rows(server: WandbServer) -> None:
    """One run, with each step once, in order."""
    ((_, rows),) = server.rows.items()
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    told = [(row["step"], row["eval/final"]) for row in rows if "eval/wer/dev" in row]
    assert told == EVALUATIONS
    assert [row["_step"] for row in rows] == list(range(len(rows))), "W&B has refused none"
    assert [row["step"] for row in rows if "eval/answers" in row] == [3, 6, 9, 12]
    assert any("continued after step 4" in str(row.get("event")) for row in rows)


def test_offline(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = config_of(tmp_path, log__wandb={"mode": "offline"}, log__mlflow={"tracking_uri": uri})
    folder = killed_and_done(config)
    with WandbServer() as server:
        server.sync(folder)
        check_rows(server)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("raysft")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = {
        name: [point.step for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    assert sorted(history["train/loss"]) == list(range(1, STEPS + 1))
    assert sorted(history["eval/wer/dev"]) == [3, 6, 9, 12]
    assert all(len(set(steps)) == len(steps) for steps in history.values()), "each point once"


def test_online(tmp_path: Path) -> None:
    config = config_of(tmp_path, log__wandb={"entity": "us"})
    with WandbServer() as server:
        quick = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.5"}
        killed_and_done(config, server.environment | quick)
        check_rows(server)


def test_a_logger_that_is_added_later_gets_what_was_before(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert trained(config_of(tmp_path, train__max_steps=6)) == 0
    later = config_of(tmp_path, log__mlflow={"tracking_uri": uri})
    assert trained(later) == 0
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("raysft").experiment_id])
    points = client.get_metric_history(run.info.run_id, "train/loss")
    lines = read_lines(run_folder(later) / "metrics.jsonl")
    assert {p.step: p.value for p in points} == {line["step"]: line["loss"] for line in lines}
    assert run.data.params["train.max_steps"] == "12"
    evaluated = {p.step for p in client.get_metric_history(run.info.run_id, "eval/wer/dev")}
    assert evaluated == {3, 6, 9, 12}
    longer = config_of(tmp_path, train__max_steps=13, log__mlflow={"tracking_uri": uri})
    assert trained(longer) == 0
    run = client.get_run(run.info.run_id)
    assert run.data.params["train.max_steps"] == "12" and run.data.tags["train.max_steps"] == "13"
    assert run.data.metrics["train/step"] == 13
