"""evaluate.beside with real Ray: two groups of workers of one driver, that end with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from raysft.config import Config
from raysft.parallel import World
from raysft.run.catalogue import Catalogue
from raysft.run.evaluations import predictions_of
from raysft.run.folder import run_folder
from raysft.run.lines import read_lines
from raysft.run.signals import LEAVE
from raysft.train.loop import train
from tests.support import jobs, worlds

pytestmark = [pytest.mark.usefixtures("joined"), pytest.mark.timeout(900)]
EVERY = 50
FOR_EVER = 1_000_000


def tree(folder: Path, name: str, **changes: Any) -> Path:
    """A config of a run that is evaluated often; returns its file."""
    settings = {
        "data__eval": [{"path": str(worlds.units(folder)), "name": "dev"}],
        "train__max_steps": FOR_EVER,
        "parallel__threads": 1,
        "evaluate__every": EVERY,
        "evaluate__max_examples": 20,
        "evaluate__beside": True,
        "checkpoint__every": 10 * EVERY,
        "checkpoint__keep": 1,
    }
    config = worlds.tiny(folder, name, **(settings | changes))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    return path


def until(job: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Return once it holds; fails with the job's output if that ends before."""
    end = time.monotonic() + 400
    while not condition():
        if job.poll() is not None or time.monotonic() > end:
            job.kill()
            pytest.fail(f"the job ended early, or nothing came: {job.communicate()}")
        time.sleep(0.1)


def gone(name: str = "RayTrainWorker", seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while jobs.processes(name) and time.monotonic() < end:
        time.sleep(0.2)
    return not jobs.processes(name)


def evaluations(run: Path) -> list[dict[str, Any]]:
    return read_lines(run / "eval.jsonl")


def warnings(run: Path) -> list[tuple[int, str]]:
    events = read_lines(run / "events.jsonl")
    return [(e["step"], e["reason"]) for e in events if e["event"] == "warning"]


def evaluators(run: Path) -> list[psutil.Process]:
    """Workers that do not train."""
    files = sorted((run / "owner").glob("*.group.json"))
    trainers = {w["pid"] for file in files for w in json.loads(file.read_text())["workers"]}
    found = jobs.processes("RayTrainWorker") if trainers else []
    return [one for one in found if one.pid not in trainers]


def losses(run: Path, steps: int) -> list[tuple[float, float]]:
    lines = read_lines(run / "metrics.jsonl")[:steps]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.slow  # without Ray: tests/unit/train/test_beside.py
def test_training_goes_on_meanwhile_and_every_figure_is_as_if_it_had_stopped(
    tmp_path: Path,
) -> None:
    path = tree(tmp_path, "beside")
    run = tmp_path / "runs" / "beside"
    job = jobs.start("sft", path)
    until(job, lambda: bool(evaluations(run)))  # training has no end: nobody waits for it
    job.send_signal(signal.SIGINT)
    # Without Ray, by one process that stops for its evaluations.
    stops = {"evaluate__beside": False, "train__max_steps": EVERY + 1}
    config = Config.model_validate(yaml.safe_load(tree(tmp_path, "other", **stops).read_text()))
    train(worlds.start(config, World.current()))
    other = run_folder(config)

    output, errors = job.communicate(timeout=120)
    assert job.returncode == 130, output + errors
    assert "Traceback" not in output + errors
    assert gone()
    assert losses(run, EVERY) == losses(other, EVERY)
    line, stopped = evaluations(run)[0], evaluations(other)[0]
    assert line["step"] == EVERY and line == {**stopped, "checkpoint": True}
    answers = [predictions_of(one, EVERY).read_bytes() for one in (run, other)]
    assert answers[0] == answers[1] != b""


@pytest.mark.slow
def test_the_next_start_makes_up_for_what_was_left(tmp_path: Path) -> None:
    path = tree(tmp_path, "left")
    run = tmp_path / "runs" / "left"
    job = jobs.start("sft", path)
    until(job, lambda: len(evaluations(run)) >= 2)
    job.send_signal(signal.SIGTERM)
    output, errors = job.communicate(timeout=120)
    assert job.returncode == 143, output + errors
    steps = [line["step"] for line in evaluations(run)]
    assert steps == list(range(EVERY, EVERY * len(steps) + 1, EVERY))
    reached = read_lines(run / "metrics.jsonl")[-1]["step"]
    done = jobs.call("sft", path, f"train.max_steps={reached + 1}")
    assert done.returncode == 0, done.stderr
    due = list(range(EVERY, reached + 1, EVERY))
    assert sorted(line["step"] for line in evaluations(run)) == [*due, reached + 1]
    assert evaluations(run)[-1]["final"]
    assert not list((run / "predictions").glob(".*"))
    catalogue = Catalogue.of(
        Config.model_validate(yaml.safe_load(path.read_text())).checkpoint, run
    )
    assert [saved.step for saved in catalogue.committed()] == [reached + 1]
    again = jobs.call("sft", path, f"train.max_steps={reached + 1}")
    assert again.returncode == 0 and "is finished" in again.stdout + again.stderr


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_neither_group(tmp_path: Path) -> None:
    path = tree(tmp_path, "killed")
    run = tmp_path / "runs" / "killed"
    job = jobs.start("sft", path)
    until(job, lambda: bool(evaluators(run)))
    job.kill()
    job.wait()
    assert gone()


@pytest.mark.slow
def test_workers_that_are_lost_are_told_of_once_and_nothing_is_left_out(tmp_path: Path) -> None:
    path = tree(tmp_path, "lost", parallel__max_failures=0)
    run = tmp_path / "runs" / "lost"
    job = jobs.start("sft", path)

    def kill() -> bool:
        for process in evaluators(run):
            process.kill()
        return bool(warnings(run))

    until(job, kill)
    job.send_signal(signal.SIGTERM)
    output, errors = job.communicate(timeout=120)
    assert job.returncode == 143, output + errors
    ((_, told),) = warnings(run)
    assert "evaluate.beside" in told and "process died" in told
    reached = read_lines(run / "metrics.jsonl")[-1]["step"]
    done = jobs.call("sft", path, f"train.max_steps={reached + 1}")
    assert done.returncode == 0, done.stderr
    due = list(range(EVERY, reached + 1, EVERY))
    assert sorted(line["step"] for line in evaluations(run)) == [*due, reached + 1]
    assert len(warnings(run)) == 1


@pytest.mark.slow
def test_an_evaluation_that_fails_is_told_of_once_and_others_are_made(tmp_path: Path) -> None:
    path = tree(tmp_path, "failing")
    run = tmp_path / "runs" / "failing"
    config = Config.model_validate(yaml.safe_load(path.read_text()))
    job = worlds.start(config, World.current())
    job.signal = lambda: LEAVE if read_lines(run / "metrics.jsonl")[2 * EVERY :] else 0
    train(job)
    (run / "checkpoints" / f"step_{EVERY}" / "config.yaml").write_text("another")
    process = jobs.start("sft", path)
    until(process, lambda: len(evaluations(run)) >= 1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 143, output + errors
    assert evaluations(run)[0]["step"] == 2 * EVERY
    ((step, told),) = warnings(run)
    assert step == EVERY and f"the evaluation of step {EVERY} failed" in told
    assert "config.yaml is not as it was written" in told


def test_a_cluster_without_room_for_it_is_refused_before_the_start(tmp_path: Path) -> None:
    cpus = len(os.sched_getaffinity(0))
    path = tree(tmp_path, "none", parallel__cpus_per_worker=cpus)
    done = jobs.call("sft", path)
    assert done.returncode == 1, done.stderr
    assert "evaluate.beside: 1 workers that train (parallel.workers)" in done.stderr
    assert "parallel.cpus_per_worker" in done.stderr and "evaluate.workers" in done.stderr
    assert not (tmp_path / "runs" / "none" / "plan.json").exists()


GPUS = """
import ray
from raysft.config import Config
from raysft.driver.shares import Shares
from raysft.errors import UserError

def shares(training, **evaluate):
    tree = {"parallel": {"workers": training}, "evaluate": {"every": 5, "beside": True, **evaluate}}
    try:
        return Shares.of(Config.model_validate(tree))
    except UserError as error:
        return str(error)

ray.init(address="local", num_cpus=4, num_gpus=3, include_dashboard=False, log_to_driver=False)
two, alone = shares(2), shares(2, beside=False)
print(two.per_worker, two.beside().per_worker, two.data_cpus, two.threads == alone.threads)
print(shares(3))
print(shares(1, workers=3))
"""


@pytest.mark.slow
def test_workers_that_evaluate_have_gpus_of_their_own(
    spawn: Callable[..., subprocess.Popen[str]],
) -> None:
    process = spawn(GPUS, RAY_AUTH_MODE="disabled")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    two, three, four = output.splitlines()
    whole = {"CPU": 1.0, "GPU": 1.0}
    assert two == f"{whole} {whole} 1.0 True"
    for said, training, beside in ((three, 3, 1), (four, 1, 3)):
        assert f"{training} workers that train (parallel.workers) and {beside} that" in said
        assert "the cluster has 3" in said
