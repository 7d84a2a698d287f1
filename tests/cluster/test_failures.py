"""Workers and drivers that die or freeze, and other numbers of workers: the run goes on exactly."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from raysft.audit import audit
from raysft.run.lines import read_lines
from tests.properties.test_world_sizes import ledger
from tests.support import jobs
from tests.support.models import AUDIO

pytestmark = [pytest.mark.usefixtures("joined"), pytest.mark.timeout(600)]
STEPS = 20


@pytest.fixture(scope="module")
def config(make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Constant rate: such a run may be given more steps when it is continued."""
    folder = tmp_path_factory.mktemp("failures")
    tree = {
        "run": {"name": "one", "storage_path": str(folder / "runs")},
        "data": {"train": [str(make_clips(60))], "lanes": 4, "tokens_per_batch": 400},
        "model": AUDIO,
        "parallel": {"backoff_s": 0.0, "timeout_s": 10},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": STEPS},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 3},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path, joined: None) -> Path:
    """One worker, never disturbed."""
    done = jobs.call("sft", config)
    assert done.returncode == 0, done.stderr
    return config.parent / "runs" / "one"


def losses(run: Path) -> list[float]:
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def gone(name: str, seconds: float = 30.0) -> bool:
    """Whether no process of that name is left after at most `seconds`."""
    end = time.monotonic() + seconds
    while jobs.processes(name) and time.monotonic() < end:
        time.sleep(0.2)
    return not jobs.processes(name)


@pytest.mark.slow  # test_world_sizes does it without Ray
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_workers_then_two_then_three_then_one_train_the_same(
    strategy: str, config: Path, undisturbed: Path
) -> None:
    """The driver of the first is killed; the others end where they were told to."""
    words = (f"run.name={strategy}", f"parallel.strategy={strategy}")
    run = undisturbed.with_name(strategy)
    first = jobs.start("sft", config, *words, "parallel.workers=4", "train.max_steps=9")
    jobs.wait_for_step(first, run, 5)
    first.kill()
    first.wait()
    for workers, steps in ((2, 10), (3, 15), (1, STEPS)):
        assert gone("RayTrainWorker"), "a driver's workers end with it"
        done = jobs.call(
            "sft", config, *words, f"parallel.workers={workers}", f"train.max_steps={steps}"
        )
        assert done.returncode == 0, done.stderr
    sizes = [line["world_size"] for line in read_lines(run / "metrics.jsonl")]
    assert list(dict.fromkeys(sizes)) == [4, 2, 3, 1]
    assert audit(run).clean
    assert ledger(run) == ledger(undisturbed)
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)


@pytest.mark.slow  # a frozen process, without Ray: test_watchdog
@pytest.mark.parametrize("workers", [1, 2])
def test_a_frozen_worker_is_noticed_and_replaced(
    workers: int, config: Path, undisturbed: Path
) -> None:
    name = f"frozen_{workers}"
    run = undisturbed.with_name(name)
    job = jobs.start("sft", config, f"run.name={name}", f"parallel.workers={workers}")
    jobs.wait_for_step(job, run, 5)
    jobs.processes("RayTrainWorker")[0].send_signal(signal.SIGSTOP)
    frozen = time.time()
    output, errors = job.communicate(timeout=200)
    assert job.returncode == 0, output + errors
    (again,) = [e for e in read_lines(run / "events.jsonl") if e["event"] == "continued"]
    took = again["time"] - frozen
    assert took < 60, f"{took:.0f} s, of which parallel.timeout_s is 10"
    assert again["lost_s"] > 0
    assert audit(run).clean
    assert ledger(run) == ledger(undisturbed)
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)


@pytest.mark.slow
def test_data_tasks_that_are_killed_are_done_again(config: Path, undisturbed: Path) -> None:
    run = undisturbed.with_name("data_tasks")
    job = jobs.start("sft", config, "run.name=data_tasks")
    killed = 0
    while job.poll() is None and killed < 3:
        for process in jobs.processes("ray::read_micro_batches"):
            process.kill()
            killed += 1
        time.sleep(0.05)
    output, errors = job.communicate(timeout=200)
    assert job.returncode == 0, output + errors
    assert killed
    assert audit(run).clean
    assert losses(run) == losses(undisturbed)


@pytest.mark.slow
def test_a_run_that_gets_nowhere_ends_and_says_why(config: Path, undisturbed: Path) -> None:
    run = undisturbed.with_name("hopeless")
    job = jobs.start(
        "sft", config, "run.name=hopeless", "parallel.max_failures=1", "checkpoint.every=1000"
    )
    for _ in range(2):
        jobs.wait_for_step(job, run, 1)
        for process in jobs.processes("RayTrainWorker"):
            process.kill()
        (run / "metrics.jsonl").unlink(missing_ok=True)
    output, errors = job.communicate(timeout=200)
    assert job.returncode == 1, output + errors
    assert "parallel.max_failures=1" in errors and "process died" in errors
    assert "Traceback" not in errors
    assert not [p for p in psutil.process_iter() if p.pid == job.pid]
