"""Nodes that go and come, a head that dies, notice of pre-emption: on three raylets."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from raysft.audit import audit
from raysft.run.lines import read_lines
from tests.cluster.conftest import PYTHON, alive, wait_until
from tests.cluster.test_local_cluster import RAY, SCRIPT, Cluster, holders
from tests.support.models import AUDIO

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
# A job that is told to stop gets this long to save.
GRACE = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "40"}})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    temp = Path("/tmp") / f"nf{os.getpid()}"
    temp.mkdir()
    cluster = Cluster(temp)
    cluster.environ |= {
        "RAYSFT_PORT_BASE": "23000",
        "RAYSFT_DASHBOARD_PORT": "22999",
        "RAYSFT_NODE_CPUS": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # addresses on loopback stay as they are
    }
    try:
        cluster.start()
        yield cluster
    finally:
        stopped = cluster.run(SCRIPT, "stop")
        assert stopped.returncode == 0, stopped.stderr
        assert not alive(holders(cluster.folder))
        temp.rmdir()


@pytest.fixture(scope="module")
def config(make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An endless run that saves every 10 steps."""
    folder = tmp_path_factory.mktemp("nodes")
    tree = {
        "run": {"name": "run", "storage_path": str(folder / "runs")},
        "data": {"train": [str(make_clips(60))], "lanes": 6, "tokens_per_batch": 300},
        "model": AUDIO,
        "parallel": {"backoff_s": 0.0, "timeout_s": 60},
        "train": {"max_steps": 100_000},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 10},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class Job:
    """A submitted job, and the run it trains."""

    def __init__(self, cluster: Cluster, config: Path, name: str, *words: str) -> None:
        self.cluster, self.id = cluster, f"{name}-{time.time_ns()}"
        self.run = config.parent / "runs" / name
        done = cluster.run(
            *(RAY, "job", "submit", "--no-wait", "--submission-id", self.id),
            *("--working-dir", ".", "--runtime-env-json", GRACE),
            *("--", PYTHON, "jobs/sft.py", str(config), f"run.name={name}", *words),
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def steps(self) -> int:
        lines = read_lines(self.run / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0

    def workers(self) -> int:
        lines = read_lines(self.run / "metrics.jsonl")
        return lines[-1]["world_size"] if lines else 0

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = read_lines(self.run / "events.jsonl")
        return [line for line in lines if line["event"] == name]

    def wait(self, condition: Callable[[], bool], seconds: float) -> float:
        """Seconds until `condition` held; fails with the job's log after `seconds`."""
        begun = time.monotonic()
        if not wait_until(condition, seconds):
            log = self.cluster.run(RAY, "job", "logs", self.id)
            events = read_lines(self.run / "events.jsonl")
            pytest.fail(f"not within {seconds:g} s: {events}\n{log.stdout}\n{log.stderr}")
        return time.monotonic() - begun

    def stop(self) -> None:
        """`ray job stop`, and wait until the job has left."""
        done = self.cluster.run(RAY, "job", "stop", self.id)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_shrinks_when_a_node_is_lost_and_grows_when_it_is_back(
    cluster: Cluster, config: Path
) -> None:
    job = Job(cluster, config, "elastic", "parallel.workers=[1, 3]")
    job.wait(lambda: job.workers() == 3 and job.steps() > 12, 180)
    assert cluster.run(SCRIPT, "lose", "2").returncode == 0
    shrunk = job.wait(lambda: job.workers() == 2, 60)
    (lost,) = job.events("continued")
    assert (lost["workers_before"], lost["workers"]) == (3, 2)
    assert "died" in lost["reason"] or "lost" in lost["reason"], lost
    assert cluster.run(SCRIPT, "add", "2").returncode == 0
    grown = job.wait(lambda: job.workers() == 3, 60)
    back = job.events("continued")[1]
    assert back["reason"] == "resized from 2 to 3 workers"
    steps = job.steps()
    job.wait(lambda: job.steps() > steps + 5, 60)
    job.stop()
    assert job.events("stopped"), "SIGTERM saves before it leaves"
    report = audit(job.run)
    assert report.clean, report
    print(f"training with 2 workers after {shrunk:.0f} s, with 3 again after {grown:.0f} s")


def test_notice_of_preemption_saves_before_the_node_goes(cluster: Cluster, config: Path) -> None:
    job = Job(cluster, config, "drained", "parallel.workers=[1, 3]", "checkpoint.every=100000")
    job.wait(lambda: job.workers() == 3 and job.steps() > 3, 180)
    listed = cluster.run(RAY, "list", "nodes", "--format", "json")
    ids = {node["node_name"]: node["node_id"] for node in json.loads(listed.stdout)}
    gcs = "127.0.0.1:" + cluster.environ["RAYSFT_PORT_BASE"]
    done = cluster.run(
        *(RAY, "drain-node", "--address", gcs, "--node-id", ids["node2"]),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
        *("--deadline-remaining-seconds", "15"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job.wait(lambda: bool(job.events("saved")), 15)
    assert cluster.run(SCRIPT, "lose", "2").returncode == 0
    job.wait(lambda: job.workers() == 2, 90)
    job.stop()
    assert audit(job.run).clean
    assert cluster.run(SCRIPT, "add", "2").returncode == 0


def test_a_head_that_dies_loses_nothing(cluster: Cluster, config: Path) -> None:
    """The job submitted again does not start from zero (ray 45516, kuberay 2153)."""
    job = Job(cluster, config, "headless", "parallel.workers=2")
    job.wait(lambda: job.steps() > 14, 180)
    assert cluster.run(SCRIPT, "lose", "0").returncode == 0
    assert cluster.run(SCRIPT, "stop").returncode == 0
    cluster.start()
    saved = max(line["step"] for line in job.events("saved"))
    again = Job(cluster, config, "headless", "parallel.workers=2")
    again.wait(lambda: bool(again.events("continued")), 180)
    again.wait(lambda: again.steps() > saved + 3, 60)
    assert again.events("continued")[-1]["step"] >= saved
    again.stop()
    assert audit(again.run).clean


def test_ray_job_stop_is_a_clean_end(cluster: Cluster) -> None:
    """After all of the above nothing of the jobs is left."""

    def busy() -> list[str]:
        names = ("sft.py", "RayTrainWorker", "TrainController")
        found = []
        for process in alive(holders(cluster.folder)):
            with contextlib.suppress(psutil.Error):  # it ends while it is looked at
                if any(name in " ".join(process.cmdline()) for name in names):
                    found.append(" ".join(process.cmdline()))
        return found

    assert wait_until(lambda: not busy(), 30), busy()
