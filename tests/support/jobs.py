"""Run jobs as a user does: `call` in this process (imports paid once), `start` in its own."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil
import pytest

from raysft.run.lines import read_lines
from tests.cluster.conftest import default_interrupt

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Done:
    """A job that has ended."""

    returncode: int
    stdout: str
    stderr: str


def call(job: str, *words: object, cwd: Path = ROOT) -> Done:
    """What `python jobs/JOB.py WORDS` does, by its own entry point, exit code included."""
    path = ROOT / "jobs" / f"{job}.py"
    spec = importlib.util.spec_from_file_location(f"job_{job}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [str(path), *map(str, words)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd),
    ):
        try:
            module.guarded(module.main)
        except SystemExit as left:
            code = int(left.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def start(job: str, *words: object) -> subprocess.Popen[str]:
    """`python jobs/JOB.py WORDS` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_interrupt,
    )


def processes(name: str) -> list[psutil.Process]:
    """Of the cluster at RAY_ADDRESS: processes that Ray calls so (RayTrainWorker, ...). Another
    Ray of this machine is left alone."""
    port = os.environ["RAY_ADDRESS"].rsplit(":", 1)[1]
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                raylet = " ".join(process.parent().cmdline())
                if f":{port}" in raylet:
                    found.append(process)
    return found


def wait_for_step(job: subprocess.Popen[str], run: Path, step: int) -> None:
    """Return once `step` is logged; fails with the job's output if it ends before."""
    end = time.monotonic() + 200
    while len(read_lines(run / "metrics.jsonl")) < step:
        if job.poll() is not None or time.monotonic() > end:
            job.kill()
            pytest.fail(f"the job ended early: {job.communicate()}")
        time.sleep(0.05)
