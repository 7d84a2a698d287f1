"""A cluster of `cluster/local.sh` for a benchmark: jobs run on it, and its processes can be killed.

With ports and a folder of its own, so that it meets no other Ray of this machine. Costs 8 s to
start, 5 s more a worker node.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


class Cluster:
    """cluster/local.sh with ports and a folder of its own."""

    port = 29000

    def __init__(self, folder: Path, nodes: int) -> None:
        """nodes: beside the head, on two CPUs each; without any the head has four."""
        self.folder = folder / f"raysft-{os.getuid()}"
        self.nodes = nodes
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAYSFT_"))}
        self._environ = {
            **kept,
            "TMPDIR": str(folder),
            "RAYSFT_PORT_BASE": str(self.port),
            "RAYSFT_DASHBOARD_PORT": str(self.port - 1),
            "RAYSFT_NODES": str(nodes),
            "RAYSFT_HEAD_CPUS": "1" if nodes else "4",
            "RAYSFT_NODE_CPUS": "2",
            # Ray runs workers at nice 15: whatever else runs here would slow training down.
            "RAY_worker_niceness": "0",
        }
        self._adding: subprocess.Popen[bytes] | None = None

    def do(self, *words: str) -> None:
        """`local.sh WORDS`. Raises RuntimeError where that fails."""
        done = subprocess.run(self._command(*words), env=self._environ, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"local.sh {' '.join(words)}: {done.stderr.decode()}")

    def driver(self, folder: Path, name: str) -> subprocess.Popen[bytes]:
        """Start the job on the cluster; what it prints is added to NAME.log."""
        environ = {
            **self._environ,
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # local.sh says why
        }
        command = [sys.executable, str(ROOT / "jobs" / "sft.py"), str(folder / "chaos.yaml")]
        with open(folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                [*command, f"run.name={name}"], env=environ, cwd=ROOT, stdout=log, stderr=log
            )

    def victims(self, kind: str) -> list[psutil.Process]:
        """Training workers, or processes that read now, of this cluster and no other."""
        title = "ray::RayTrainWorker" if kind == "worker" else "ray::read_micro_batches"
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if "".join(process.cmdline()[:1]).startswith(title):
                    parent = process.parent()
                    if parent is not None and f"{self.folder}/" in " ".join(parent.cmdline()):
                        found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def lose_node(self, number: int) -> float | None:
        """Kill all on a node, and 2 s later begin to add it again; returns when it died. None:
        the last node that was lost is not back yet."""
        if self._adding is not None:
            if self._adding.poll() is None:
                return None
            self.added()
        self.do("lose", str(number))
        died = time.time()
        # Killed processes take a moment to be gone.
        command = ["bash", "-c", 'sleep 2; "$@" >&2', "add", *self._command("add", str(number))]
        self._adding = subprocess.Popen(command, env=self._environ, stderr=subprocess.PIPE)
        return died

    def added(self) -> None:
        """Wait for a node that is being added. Raises RuntimeError where it does not start."""
        adding, self._adding = self._adding, None
        if adding is not None:
            _, said = adding.communicate()
            if adding.returncode:
                raise RuntimeError(f"local.sh add: {said.decode()}")

    def _command(self, *words: str) -> list[str]:
        return [str(ROOT / "cluster" / "local.sh"), *words]
