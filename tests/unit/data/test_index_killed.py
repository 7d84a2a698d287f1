"""Builds of an index that are killed, in real processes, and several at once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from raysft.data.index import fan_out, unfinished
from raysft.data.sources import json_lines
from tests.support.indexes import Encoder, asr, build, chunked_small, clip, contents, corpus, jsonl

SPAWN = multiprocessing.get_context("spawn")


class Killed(Encoder):
    """Ends its process, as nobody can catch, before it measures example number `most`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def measure(self, example, samples):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().measure(example, samples)


class Counted(Encoder):
    """Counts what it measures."""

    count = 0

    def measure(self, example, samples):
        self.count += 1
        return super().measure(example, samples)


class Slow(Encoder):
    """Takes its time, and says that it does."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def measure(self, example, samples):
        self.mark.touch()
        time.sleep(0.01)
        return super().measure(example, samples)


def small_chunks() -> None:
    """Many chunks a file, kept at once."""
    chunked_small(pytest.MonkeyPatch())
    unfinished.EVERY_S = 0.0
    fan_out._PARALLEL_FROM = 1


def in_process(folder: str, paths: list[str], encoder: Encoder, workers: int) -> None:
    small_chunks()
    build(Path(folder), *map(Path, paths), encoder=encoder, workers=workers)


def started(folder: Path, paths: list[Path], encoder: Encoder, workers: int = 1) -> BaseProcess:
    given = (str(folder), list(map(str, paths)), encoder, workers)
    process = SPAWN.Process(target=in_process, args=given)
    process.start()
    return process


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def files(tmp_path, monkeypatch) -> list[Path]:
    monkeypatch.setattr(json_lines.survey, "__defaults__", (300,))
    return [corpus(tmp_path / name, 60) for name in ("a", "b")]


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.unfinished")]


def test_a_build_that_is_killed_goes_on_where_it_was(tmp_path, files):
    counting = Counted()
    whole = contents(build(tmp_path / "undisturbed", *files, encoder=counting, workers=1))
    total = counting.count
    for number in range(3):
        killed = started(tmp_path / "i", files, Killed(total // 3))
        killed.join()
        assert killed.exitcode == -signal.SIGKILL, number
        if number == 0:
            assert left(tmp_path / "i")
    counting = Counted()
    index = build(tmp_path / "i", *files, encoder=counting, workers=1)
    # What was under way is lost with each kill: a chunk or two of six lines.
    assert counting.count < total * 0.2
    assert contents(index) == whole
    assert left(tmp_path / "i") == []


def test_a_file_that_changes_after_a_kill_keeps_what_is_still_in_it(tmp_path, files):
    file = files[0]
    killed = started(tmp_path / "i", [file], Killed(30))
    killed.join()
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], '{"task_type": "asr"}', *lines[2:]]) + "\n")
    os.utime(file, (time.time() - 100,) * 2)
    counting = Counted()
    index = build(tmp_path / "i", file, encoder=counting, workers=1)
    again = Counted()
    assert contents(build(tmp_path / "new", file, encoder=again, workers=1)) == contents(index)
    assert again.count - 30 <= counting.count < again.count - 10


def test_what_a_killed_build_left_is_not_used_with_other_clips(tmp_path, files):
    killed = started(tmp_path / "i", files, Killed(40))
    killed.join()
    clip(files[0].parent / "1.wav", 0.9)
    index = build(tmp_path / "i", *files, workers=1)
    assert contents(index) == contents(build(tmp_path / "new", *files, workers=1))


def test_of_two_builds_at_once_one_may_be_killed_at_any_time(tmp_path, files):
    whole = contents(build(tmp_path / "undisturbed", *files, workers=1))
    for number in range(4):
        shutil.rmtree(tmp_path / "i", ignore_errors=True)
        marks = [tmp_path / f"{number}.{name}" for name in ("one", "two")]
        one, two = (started(tmp_path / "i", files, Slow(mark)) for mark in marks)
        wait_for(lambda marks=marks: all(mark.exists() for mark in marks))
        time.sleep(0.3 * number)
        os.kill(one.pid, signal.SIGKILL)
        two.join()
        assert two.exitcode == 0
        assert contents(build(tmp_path / "i", *files)) == whole
        assert left(tmp_path / "i") == []


def test_what_was_half_written_is_cleared_away_after_a_day(tmp_path, files):
    build(tmp_path / "i", *files)
    old, new = (tmp_path / "i/parts" / f".{name}.npz.123" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    build(tmp_path / "i", *files)
    assert new.exists() and not old.exists()


def test_processes_of_a_build_that_is_killed_end(tmp_path):
    clip(tmp_path / "a.wav")
    file = jsonl(tmp_path / "t.jsonl", [asr(text=f"{i}") for i in range(3000)])
    mark = tmp_path / "mark"
    building = started(tmp_path / "i", [file], Slow(mark), workers=2)
    wait_for(mark.exists)
    own = psutil.Process(building.pid).children(recursive=True)
    assert len(own) >= 2
    os.kill(building.pid, signal.SIGKILL)
    building.join()
    assert psutil.wait_procs(own, timeout=20)[1] == []
