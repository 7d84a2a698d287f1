"""An embedded Ray's folder is its user's alone, and goes away however its process ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysft.driver.ray_folder import LONGEST_PARENT, RayFolder, sweep
from tests.cluster.conftest import wait_until

HOLD = """
import sys
from raysft.driver.ray_folder import RayFolder
folder = RayFolder()
folder.ray.mkdir()
print(folder.path, folder._watch.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short one: Ray's sockets lie below it."""
    found = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(found))
    monkeypatch.setenv("TMPDIR", str(found))
    yield found
    shutil.rmtree(found)


def hold() -> tuple[subprocess.Popen[str], Path, int]:
    """A process with a folder; the folder, and the process that watches."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    path, watch = process.stdout.readline().split()
    return process, Path(path), int(watch)


def test_no_other_user_can_enter_and_rays_sockets_fit(parent: Path) -> None:
    folder = RayFolder()
    assert folder.path.parent == parent and folder.ray.parent == folder.path
    assert folder.path.stat().st_mode & 0o777 == 0o700
    longest = "x" * LONGEST_PARENT + f"/{folder.path.name}/{folder.ray.name}"
    session = "session_2026-11-26_20-17-57_347949_4194304"
    assert len(f"{longest}/{session}/sockets/plasma_store") <= 107
    folder.remove()
    assert list(parent.iterdir()) == []


def test_a_folder_that_is_kept_stays_at_the_next_start(parent: Path) -> None:
    folder = RayFolder()
    folder.ray.mkdir()
    folder.keep()
    RayFolder().remove()
    assert list(parent.iterdir()) == [folder.path] and folder.ray.is_dir()


def test_after_a_kill_it_is_gone_within_seconds(parent: Path) -> None:
    process, path, _ = hold()
    assert path.is_dir()
    process.kill()
    process.wait()
    assert wait_until(lambda: not path.exists(), 20)


def test_where_all_of_it_was_killed_the_next_start_removes_it_and_none_that_is_in_use(
    parent: Path,
) -> None:
    process, dead, watch = hold()
    other, alive, _ = hold()
    os.kill(watch, signal.SIGKILL)
    process.kill()
    process.wait()
    strangers = [parent / "raysft-1000", parent / "raysft-ofbefore"]
    for path in strangers:  # cluster/local.sh has such a name, and older versions had
        (path / "ray").mkdir(parents=True)
    (parent / "raysft-link").symlink_to(alive)
    time.sleep(0.1)
    assert dead.is_dir()
    sweep(parent)
    assert not dead.exists()
    assert alive.is_dir() and all((path / "ray").is_dir() for path in strangers)
    other.kill()
    other.wait()
    assert wait_until(lambda: not alive.exists(), 20)
