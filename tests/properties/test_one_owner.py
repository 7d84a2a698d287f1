"""A run that is alive has one driver: in real processes, on a folder and on an object store.

`worlds.drive` does what `launch.run` does, in its order, without Ray.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from raysft.config import Config
from raysft.parallel import World
from raysft.run.folder import run_folder
from raysft.run.lines import read_lines
from raysft.run.ownership import BEAT_S, Ownership, Process
from raysft.train.loop import train
from raysft.train.watchdog import EXIT_CODE, Orphaned
from tests.properties.test_kill_while_saving import home, same, sound, undisturbed, whole
from tests.support.objects import ObjectStore
from tests.support.worlds import drive, fork, join, start, tiny

__all__ = ["home", "undisturbed"]
LAST = 12
REFUSED = 5

pytestmark = pytest.mark.timeout(1800)  # fifty starts of ten seconds and more


def config_of(home: Path, name: str, place: str, **changes: Any) -> Config:
    if place == "objects":
        changes["checkpoint__path"] = f"{ObjectStore.protocol}://{home}/bucket/{name}"
    return tiny(home, name, **{"train__max_steps": LAST, **changes})


def wait_for(condition: Callable[[], Any], *processes: BaseProcess, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert all(process.is_alive() for process in processes)
        time.sleep(0.02)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("place", ["folder", pytest.param("objects", marks=pytest.mark.slow)])
@pytest.mark.parametrize("times", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_of_two_drivers_started_at_once_one_trains_and_the_other_says_so(
    times: int, place: str, home: Path, undisturbed: Path, tmp_path: Path
) -> None:
    for number in range(times):
        config = config_of(home, f"twice_{place}_{number}_{times}", place)
        said = [tmp_path / f"{number}_{i}" for i in range(2)]
        pair = [fork(drive, config, path, slow_steps) for path in said]
        for process in pair:
            process.join()
        (loser,) = [i for i, process in enumerate(pair) if process.exitcode == REFUSED]
        assert pair[1 - loser].exitcode == 0
        text = said[loser].read_text()
        assert f"this run is under way: process {pair[1 - loser].pid} on " in text
        same(run_folder(config), undisturbed)
        events = [e["event"] for e in read_lines(run_folder(config) / "events.jsonl")]
        assert [e for e in events if e != "saved"] == ["started", "finished"]


def slow_steps(line: dict[str, Any]) -> None:
    """So that a run lasts longer than a second start needs to look at it."""
    if "loss" in line:
        time.sleep(3 * BEAT_S / LAST)


def paused(config: Config, at: int, folder: Path) -> None:
    """Train; in step `at` say so, and be frozen, beats and all, until woken."""

    def progress(line: dict[str, Any]) -> None:
        if line.get("step") == at and "loss" in line:
            (folder / "paused").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    drive(config, folder / "said", progress)


@pytest.mark.parametrize("place", [pytest.param("folder", marks=pytest.mark.slow), "objects"])
def test_a_job_whose_run_another_has_taken_over_changes_nothing_any_more(
    place: str, home: Path, undisturbed: Path, tmp_path: Path
) -> None:
    config = config_of(home, f"taken_{place}", place)
    first = fork(paused, config, 6, tmp_path)
    wait_for((tmp_path / "paused").exists, first)
    run, bucket = run_folder(config), home / "bucket"
    second = fork(drive, config, tmp_path / "second", None, 2 * BEAT_S)
    second.join()
    assert second.exitcode == 0
    before = {**files(run), **files(bucket)}
    os.kill(first.pid or 0, signal.SIGCONT)
    first.join()
    assert first.exitcode == REFUSED
    assert "another job has taken over this run" in (tmp_path / "said").read_text()
    assert {**files(run), **files(bucket)} == before
    same(run, undisturbed)


# -- orphans -------------------------------------------------------------------------------------


def lead(config: Config, meeting: Path) -> None:
    """A driver whose worker is another process: owns, opens and plans, hands the lease over."""
    with Ownership.take(run_folder(config)) as owner:
        start(config, World.current(), permit=owner)
        content = pickle.dumps((replace(owner.lease, group=1), Process.this()))
        (meeting / "lease.tmp").write_bytes(content)
        (meeting / "lease.tmp").rename(meeting / "lease")
        while True:
            time.sleep(0.02)
            owner.require()


def follow(config: Config, meeting: Path) -> None:
    """Its worker."""
    while not (meeting / "lease").exists():
        time.sleep(0.02)
    lease, driver = pickle.loads((meeting / "lease").read_bytes())
    job = join(config, World.current())
    job.lease = lease
    Orphaned(lease, driver, lambda reason: None)
    train(job)


ENDLESS = 10_000


def pair(home: Path, config: Config, number: int) -> tuple[list[BaseProcess], Path]:
    meeting = home / f"meeting_{config.run.name}_{number}"
    meeting.mkdir()
    return [fork(lead, config, meeting), fork(follow, config, meeting)], meeting


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", [pytest.param("folder", marks=pytest.mark.slow), "objects"])
def test_no_orphan_of_a_killed_driver_writes_after_the_next_owner_has_begun(
    place: str, times: int, home: Path
) -> None:
    name = f"orphans_{place}_{times}"
    config = config_of(home, name, place, train__max_steps=ENDLESS, checkpoint__every=3)
    run = run_folder(config)
    (driver, worker), _ = pair(home, config, 0)
    for number in range(1, times + 1):
        known = len(read_lines(run / "metrics.jsonl"))
        wait_for(lambda k=known: len(read_lines(run / "metrics.jsonl")) >= k + 4, driver, worker)
        written = [*run.glob("ledger/*"), *run.glob("*.jsonl")]
        held = [open(path, "rb") for path in written]  # noqa: SIM115 - of this life's files
        driver.kill()
        driver.join()
        killed = time.monotonic()
        (driver, other), _ = pair(home, config, number)
        worker.join()
        assert time.monotonic() - killed < 10.0, "an orphan ends within seconds"
        assert worker.exitcode in (1, EXIT_CODE), "it was told, or ended itself"
        wait_for(lambda n=number: started(run, n), driver, other)
        began = (run / "config.yaml").stat().st_mtime_ns  # what an owner writes first
        for file in held:
            assert os.fstat(file.fileno()).st_mtime_ns < began
            file.close()
        worker = other
    for process in (worker, driver):
        process.kill()
        process.join()
    newest = max(sound(run, config.checkpoint.path), default=0)
    last = fork(drive, config_of(home, name, place, train__max_steps=newest + 2))
    last.join()
    assert last.exitcode == 0
    same(run, whole(home, newest + 2))


def started(run: Path, number: int) -> bool:
    """Whether the start after kill `number` has begun to train."""
    events = [e["event"] for e in read_lines(run / "events.jsonl")]
    return len([e for e in events if e in ("started", "continued")]) > number
