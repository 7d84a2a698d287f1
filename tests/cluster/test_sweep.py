"""Sweeps under Ray Tune: each trial once, whatever dies; the best one can be had again."""

from __future__ import annotations

import csv
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from raysft.audit import audit
from raysft.run.lines import read_lines
from raysft.sweep.folder import SweepFolder
from tests.support import jobs
from tests.support.models import CAUSAL
from tests.support.swept import write_texts
from tests.support.wandb_server import WandbServer

pytestmark = [pytest.mark.usefixtures("joined"), pytest.mark.timeout(900)]
STEPS, EVERY = 6, 2


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A config of a small text model, and of the sweep that is asked for."""
    folder = tmp_path_factory.mktemp("sweeps")
    write_texts(folder)

    def made(name: str, space: dict[str, Any], **sweep: Any) -> Path:
        tree = {
            "run": {"name": name, "storage_path": str(folder / "runs")},
            "data": {
                "train": [str(folder / "train.jsonl")],
                "eval": [{"path": str(folder / "dev.jsonl"), "name": "dev"}],
                "lanes": 2,
                "tokens_per_batch": 128,
            },
            "model": CAUSAL,
            "parallel": {"backoff_s": 0.0},
            "train": {"max_steps": STEPS},
            "evaluate": {"every": EVERY, "generate": False},
            "checkpoint": {"every": EVERY},
            "log": {"every": 1, "tensorboard": False},
            "sweep": {"space": space, "metric": "loss", **sweep},
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return made


def rows(config: Path) -> list[dict[str, str]]:
    with open(folder_of(config) / "results.csv", newline="") as lines:
        return list(csv.DictReader(lines))


def folder_of(config: Path) -> Path:
    return config.parent / "runs" / config.stem


def starts(run: Path) -> int:
    return sum(line["event"] == "started" for line in read_lines(run / "events.jsonl"))


@pytest.mark.slow
def test_a_grid_is_ranked_and_its_best_can_be_had_again(make: Callable[..., Path]) -> None:
    """One that cannot be trained is tried again, and then a row that says why."""
    space = {"optim.lr": [1e-4, 1e-2], "data.max_seconds": [None]}
    config = make("grid", space)
    done = jobs.call("sweep", config)
    assert done.returncode == 0, done.stderr
    found = rows(config)
    assert [row["status"] for row in found] == ["finished"] * 2
    assert [row["optim.lr"] for row in found] == ["0.01", "0.0001"]
    assert float(found[0]["loss/chat"]) < float(found[1]["loss/chat"])
    for row in found:
        run = folder_of(config) / row["folder"]
        assert audit(run).clean
        last = read_lines(run / "eval.jsonl")[-1]
        assert float(row["loss/chat"]) == last["loss/chat"] and last["step"] == STEPS
    again = jobs.call("sft", folder_of(config) / "best.yaml")
    assert again.returncode == 0, again.stderr
    best = read_lines(config.parent / "runs" / "grid_best" / "eval.jsonl")[-1]
    assert best["loss/chat"] == float(found[0]["loss/chat"])


@pytest.mark.slow
def test_trials_are_logged_as_a_group_of_the_sweeps_name(make: Callable[..., Path]) -> None:
    config = make("told", {"optim.lr": [1e-4, 1e-2]})
    tree, uri = yaml.safe_load(config.read_text()), f"sqlite:///{config.parent}/mlflow.db"
    tree["log"] |= {"wandb": {"mode": "offline"}, "mlflow": {"tracking_uri": uri}}
    config.write_text(yaml.safe_dump(tree))
    done = jobs.call("sweep", config)
    assert done.returncode == 0, done.stderr
    trials = sorted((folder_of(config) / "trials").glob("0*"))
    assert len(trials) == 2
    with WandbServer() as server:
        for trial in trials:
            server.sync(trial)
    about = server.given.values()
    assert sorted(run["displayName"] for run in about) == [trial.name for trial in trials]
    assert all(run["groupName"] == "told" and "told" in run["tags"] for run in about)
    for rows in server.rows.values():
        steps = [row["step"] for row in rows if "train/loss" in row]
        assert steps == list(range(1, STEPS + 1))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("raysft")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(found) == [*(trial.name for trial in trials), "told"]
    parent = found.pop("told").info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent}
    assert all(run.data.metrics["train/step"] == STEPS for run in found.values())


@pytest.mark.slow
def test_what_fails_is_tried_again_and_then_reported(make: Callable[..., Path]) -> None:
    """No example fits a budget of 2: nothing but the trial fails."""
    config = make("fails", {"data.tokens_per_batch": [128, 2]})
    done = jobs.call("sweep", config)
    assert done.returncode == 0, done.stderr
    good, bad = rows(config)
    assert (good["status"], bad["status"]) == ("finished", "failed")
    assert bad["attempts"] == "2"
    assert bad["reason"].startswith("data.tokens_per_batch=2 is smaller than every example")


@pytest.mark.slow
@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_a_sweep_that_was_killed_goes_on_and_repeats_nothing(
    searcher: str, make: Callable[..., Path]
) -> None:
    if searcher == "optuna":
        pytest.importorskip("optuna")
    space = {"optim.lr": {"loguniform": [1e-5, 1e-1]}}
    config = make(f"killed_{searcher}", space, trials=4, searcher=searcher, scheduler="asha")
    sweep = SweepFolder(folder_of(config))
    first = jobs.start("sweep", config)
    end = time.monotonic() + 400
    while not any(t.number == 1 and starts(sweep.run(t)) for t in sweep.trials()):
        assert first.poll() is None and time.monotonic() < end, first.communicate()
        time.sleep(0.2)
    first.kill()
    first.wait()
    before = sweep.trials()
    done = jobs.call("sweep", config)
    assert done.returncode == 0, done.stderr
    assert sweep.trials()[: len(before)] == before
    found = rows(config)
    assert sorted(row["trial"][:4] for row in found) == [f"{n:04d}" for n in range(4)]
    assert {row["status"] for row in found} <= {"finished", "stopped"}
    assert starts(sweep.run(before[0])) == 1, "it was finished, and is not run again"
    for trial in sweep.trials():
        assert audit(sweep.run(trial)).clean
        steps = [line["step"] for line in read_lines(sweep.run(trial) / "metrics.jsonl")]
        assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_sweep_that_is_interrupted_saves_and_says_how_to_go_on(
    make: Callable[..., Path],
) -> None:
    config = make("interrupted", {"optim.lr": [1e-4, 1e-3]})
    words = ("train.max_steps=4000", "evaluate.every=5", "checkpoint.every=0")
    job = jobs.start("sweep", config, *words)
    sweep = SweepFolder(folder_of(config))
    end = time.monotonic() + 200
    while not (folder_of(config) / "trials").is_dir() or not sweep.trials():
        assert job.poll() is None and time.monotonic() < end, job.communicate()
        time.sleep(0.2)
    run = sweep.run(sweep.trials()[0])
    jobs.wait_for_step(job, run, 8)
    page = folder_of(config) / "report.html"
    while not page.is_file():  # its first trial has been evaluated, at step 5
        assert job.poll() is None and time.monotonic() < end + 60, job.communicate()
        time.sleep(0.2)
    (row,) = [row for row in rows(config) if row["status"] == "running"]
    assert row["trial"] == run.name and row["loss/chat"]
    assert f'"name": "{run.name}"' in page.read_text()
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 130
    assert "0 trial(s) are finished; the same command continues the sweep" in said
    assert [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()]
    assert not jobs.processes("RayTrainWorker")


def test_another_space_is_not_put_into_the_folder_of_a_sweep(make: Callable[..., Path]) -> None:
    config = make("other", {"optim.lr": [1e-4]})
    (folder_of(config)).mkdir(parents=True)
    from raysft.config import load_config, to_yaml

    (folder_of(config) / "sweep.yaml").write_text(to_yaml(load_config(config)))
    done = jobs.call("sweep", config, "sweep.space={optim.lr: [1e-3]}")
    assert done.returncode == 1
    assert "holds another sweep: sweep.space.optim.lr (was [0.0001], now [0.001])" in done.stderr
    done = jobs.call("sweep", config, "sweep.metric=wer")
    assert done.returncode == 1
    assert (
        "sweep.metric: wer is not measured; an evaluation on data.eval gives loss/" in done.stderr
    )
