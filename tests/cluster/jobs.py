"""Run a job as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(job: str, *words: object) -> list[str]:
    """`python jobs/JOB.py WORDS`."""
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, words)]


def run(
    job: str, *words: object, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """The finished process, with its output as text."""
    return subprocess.run(
        command(job, *words),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        check=False,
    )
