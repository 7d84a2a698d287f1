"""Bad input: one clear line, a non-zero exit, nothing left running, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from raysft.run.lines import read_lines
from tests.properties.test_world_sizes import ledger
from tests.support import jobs
from tests.support.models import AUDIO

pytestmark = pytest.mark.usefixtures("joined")


@pytest.fixture(scope="module")
def corpus(make_clips: Callable[..., Path]) -> Path:
    return make_clips(40)


@pytest.fixture
def write(corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """write(key=value) writes a config that works but for what is changed; returns its path."""

    def write(**changes: Any) -> Path:
        tree: dict[str, dict[str, Any]] = {
            "run": {"name": "run", "storage_path": str(tmp_path / "runs")},
            "data": {"train": [str(corpus)], "lanes": 2, "tokens_per_batch": 400},
            "model": dict(AUDIO),
            "train": {"max_steps": 3},
            "log": {"every": 1},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            tree.setdefault(section, {})[name] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def broken_copy(corpus: Path, target: Path, broken: int, breaker: Callable[[Path], None]) -> Path:
    """A copy of a corpus with the first `broken` clips spoiled by `breaker`."""
    shutil.copytree(corpus.parent, target)
    for number in range(broken):
        breaker(target / f"clip{number:04d}.wav")
    return target / corpus.name


def fails(config: Path | str, *words: str) -> str:
    """The one line a job fails with."""
    done = jobs.call("sft", config, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout
    return errors[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim__learning_rate": 1.0}, "optim.learning_rate: unknown key"),
        ({"data__lanes": "two"}, "data.lanes: expected a whole number greater than 0, found 'two'"),
        ({"data__train": ["nowhere.jsonl"]}, "data.train[0].path: "),
        ({"parallel__workers": 3}, "parallel.workers: 3 workers share data.lanes: 2"),
    ],
)
def test_mistakes_that_show_before_ray_starts(
    write: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert said in fails(write(**changes))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_a_gpu_that_is_not_there_is_said_by_the_dry_run_too(
    write: Callable[..., Path], tmp_path: Path, words: tuple[str, ...]
) -> None:
    line = fails(write(parallel__device="cuda"), *words)
    assert "parallel.device: cuda, but no node of the cluster has a GPU" in line
    assert not (tmp_path / "runs" / "index").exists(), "before the data is read"


def test_no_such_config(tmp_path: Path) -> None:
    assert "no such config file" in fails(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_source(write: Callable[..., Path], tmp_path: Path, content: str) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(content)
    line = fails(write(data__train=[{"path": str(empty), "format": "ming_jsonl"}]))
    assert "data.train[0]" in line and "empty.jsonl" in line


def test_unusable_examples_are_named_once_and_a_finished_run_takes_no_other_config(
    write: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    data = broken_copy(corpus, tmp_path / "data", 1, Path.unlink)
    (data.parent / "clip0001.wav").write_bytes(b"this is not audio at all")
    # A good header and samples that are not numbers: found when it is decoded.
    samples, rate = soundfile.read(data.parent / "clip0002.wav", dtype="float32")
    samples[10] = np.nan
    soundfile.write(data.parent / "clip0002.wav", samples, rate, subtype="FLOAT")
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:4], "{not json", *lines[4:]]) + "\n")
    config = write(data__train=[str(data)], data__max_quarantined=0.2, train__max_steps=8)
    done = jobs.call("sft", config)
    assert done.returncode == 0, done.stderr
    found = {Path(q["path"]).name: q for q in quarantine(tmp_path)}
    assert len(found) == len(quarantine(tmp_path)) == 4
    assert found["clip0000.wav"]["reason"] and found["clip0001.wav"]["reason"]
    assert found["clip0002.wav"]["step"] > 0
    assert "train.jsonl line 5" in found["train.jsonl"]["reason"]
    trained = {id_ for ids in ledger(tmp_path / "runs" / "run").values() for id_ in ids}
    assert len(trained) == 37  # an epoch and more, all but the three clips
    before = (tmp_path / "runs" / "run" / "config.yaml").read_bytes()
    line = fails(config, "data.lanes=4", "optim.lr=1e-3")
    assert "data.lanes (was 2, now 4); optim.lr (was 1e-05, now 0.001)" in line
    assert "run.name" in line
    assert (tmp_path / "runs" / "run" / "config.yaml").read_bytes() == before


def test_a_folder_that_is_not_a_runs_is_left_alone(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "runs" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "notes.txt").write_text("mine")
    assert "not the folder of a run" in fails(write(), "run.name=other")


def quarantine(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "runs" / "run" / "quarantine.jsonl")


def test_every_clip_unusable_fails_and_says_so(
    write: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    data = broken_copy(corpus, tmp_path / "data", 40, Path.unlink)
    line = fails(write(data__train=[str(data)]))
    assert "train.jsonl" in line and "40" in line


def test_too_many_unusable_clips_fail_with_the_share_and_a_reason(
    write: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    data = broken_copy(corpus, tmp_path / "data", 12, Path.unlink)
    line = fails(write(data__train=[str(data)]))
    assert "data.max_quarantined: 12 of 40 examples are unusable" in line


def test_a_budget_smaller_than_every_example(write: Callable[..., Path]) -> None:
    line = fails(write(data__tokens_per_batch=10))
    assert "data.tokens_per_batch" in line and "smaller than every example" in line


@pytest.mark.slow
def test_what_a_restart_cannot_mend_is_said_once_with_its_cause_and_its_place(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    """Here a file of the run that someone has edited; the other worker waits for this one."""
    config = write(parallel__workers=2, parallel__backoff_s=0.0)
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config.read_text())
    (run / "events.jsonl").write_text('{"event": "continued", "steps_again": "x"}\n')
    done = jobs.call("sft", config, "--debug")
    assert done.returncode == 1
    assert done.stdout.count("worker(s) started") == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: TypeError: unsupported operand type(s) for +=: 'int' and 'str' (raysft/train/"
    )
    assert "the same command" not in done.stdout + done.stderr
    assert "in a worker:" in done.stderr, "--debug shows the traceback"


@pytest.mark.slow  # test_kill_while_saving does it without Ray
def test_a_full_disk_fails_with_the_path_and_continues_when_there_is_room(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system needs the right to mount one")
    try:
        config = write(run__storage_path=str(small), data__index_path=str(tmp_path / "index"))
        line = fails(config, "checkpoint.every=1")
        assert "space" in line.lower() or "written" in line
        assert str(small) in line
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        done = jobs.call("sft", config)
        assert done.returncode == 0, done.stderr
        steps = [json.loads(x)["step"] for x in (small / "run" / "metrics.jsonl").open()]
        assert steps == [1, 2, 3]
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
