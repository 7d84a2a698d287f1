"""A process without progress ends itself in time and says where it stood; others live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysft.parallel import World
from raysft.train import watchdog as module
from raysft.train.loop import train
from raysft.train.watchdog import EXIT_CODE
from tests.support import worlds

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT = 0.5  # seconds

TELL = 'print("told:", reason, flush=True)'

HEAD = f"""
import sys, threading, time
from raysft.train.watchdog import Watchdog

def tell(reason):
    %s

dog = Watchdog({TIMEOUT}, tell)
print("watched", flush=True)
"""


def started(body: str, tell: str = TELL) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD % tell + body],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "watched\n"
    return process


def end(body: str, tell: str = TELL) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr, and seconds from the start of the watch."""
    process, begun = started(body, tell), time.monotonic()
    said, errors = process.communicate(timeout=20)
    return process.returncode, said, errors, time.monotonic() - begun


def test_a_process_blocked_in_a_lock_ends_with_its_stack_and_the_reason_told() -> None:
    code, said, errors, seconds = end("""
def stuck_here():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

dog.beat("in step 7")
stuck_here()
""")
    reason = f"no progress for 1 s while in step 7 (parallel.timeout_s={TIMEOUT:g})"
    assert code == EXIT_CODE == 75
    assert TIMEOUT < seconds < TIMEOUT + 2.5
    assert said == f"told: {reason}\n"
    assert errors.startswith(f"{reason}; this worker ends, the threads stood at:\n")
    assert "in stuck_here" in errors


def test_one_that_never_begins_and_one_that_cannot_tell_end_too() -> None:
    code, _, errors, seconds = end("time.sleep(60)", tell="time.sleep(60)")
    assert code == EXIT_CODE
    assert "while starting" in errors
    assert seconds < TIMEOUT + 3.5


def test_one_that_beats_lives_and_a_closed_watch_ends_nothing() -> None:
    code, said, errors, _ = end(f"""
end = time.monotonic() + 4 * {TIMEOUT}
while time.monotonic() < end:
    dog.beat("working")
    time.sleep({TIMEOUT} / 10)
dog.close()
time.sleep(3 * {TIMEOUT})
print("done")
""")
    assert (code, said, errors) == (0, "done\n", "")


def test_a_process_that_was_stopped_and_goes_on_does_not_end_itself() -> None:
    """Others saw it hang and may have ended it; where they have not, it has done nothing wrong."""
    process = started(f"""
for _ in range(8):
    dog.beat("working")
    time.sleep({TIMEOUT} / 2)
print("done")
""")
    time.sleep(TIMEOUT / 4)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4 * TIMEOUT)
    os.kill(process.pid, signal.SIGCONT)
    said, errors = process.communicate(timeout=20)
    assert (process.returncode, said, errors) == (0, "done\n", "")


def test_a_step_of_many_turns_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 lanes on 8 workers are 125 turns: each is progress, all may take longer than a hang."""
    ended: list[str] = []
    monkeypatch.setattr(module, "_leave", lambda reason, told: ended.append(reason))
    config = worlds.tiny(
        tmp_path, data__lanes=8, parallel__timeout_s=3, train__max_steps=1, model__speech_units=20
    )
    job = worlds.start(config, World.current())
    job.hung = ended.append
    job.strategy.module.register_forward_pre_hook(lambda *_: time.sleep(0.6))
    begun = time.monotonic()
    assert train(job) == 1
    assert time.monotonic() - begun > 4.5
    assert ended == []
