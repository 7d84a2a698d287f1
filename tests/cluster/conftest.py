"""What the cluster tests share: clean environments, and processes that are seen to be gone.

No module of tests imports ray at its top: it reads the environment then, once for the process, and
would join the cluster of `ray_address` without its token.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable


def without_ray_settings() -> dict[str, str]:
    """This environment, less everything that speaks to Ray; `raysft` importable."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT)}


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return condition()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run (a zombie does not)."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def default_interrupt() -> None:
    """A test run in the background ignores SIGINT, and its children would, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a Python script text; it is killed when the test is over."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, **environ: str) -> subprocess.Popen[str]:
        path = tmp_path / f"script{len(started)}.py"
        path.write_text(script)
        started.append(
            subprocess.Popen(
                [PYTHON, str(path)],
                env={**without_ray_settings(), **environ},
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=default_interrupt,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


HOLD = """
import sys
from raysft.driver.session import ray_session
with ray_session() as session:
    print(session.address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a Ray held open by another process, for every job of these tests."""
    token = secrets.token_hex(16)  # every Ray of ours asks for one
    env = {**without_ray_settings(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    for _ in range(3):  # a machine with much else to do may take longer than Ray waits
        holder = subprocess.Popen(
            [PYTHON, "-c", HOLD],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdin is not None and holder.stdout is not None
        if address := holder.stdout.readline().strip():
            break
        holder.wait()
    else:
        pytest.fail("no Ray came up")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", token)
        yield address
    holder.stdin.close()
    holder.wait(timeout=60)


@pytest.fixture(scope="module")
def joined(ray_address: str) -> Iterator[None]:
    """Jobs of this module join the cluster of `ray_address`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_address)
        yield
