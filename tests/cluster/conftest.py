"""What the cluster tests share: clean environments, and processes that are seen to be gone.

No module of tests imports ray at its top: it reads the environment then, once for the process, and
would join the cluster of `ray_address` without its token.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
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


HEAD = "f" * 51 + "00000"  # what Ray's fake provider calls its head


@pytest.fixture
def growing_cluster(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[str]:
    """The address of a cluster of a head, and an autoscaler that may add two nodes of each kind in
    `request.param`: name -> what they have. Beside them may stand there: `head`, its CPUs; `idle`,
    minutes until idle nodes leave; `dashboard`, whether there is one."""
    kinds = {**request.param}
    cpus, idle = kinds.pop("head", 2), kinds.pop("idle", 5)
    dashboard = kinds.pop("dashboard", False)
    folder, port = tmp_path_factory.mktemp("growing"), free_port()
    address = f"{own_address()}:{port}"
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "launch_multiple": True,
        "head_node_id": HEAD,
    }
    types = {
        name: {"resources": has, "node_config": {}, "max_workers": 2} for name, has in kinds.items()
    }
    head = {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0}
    config = {
        **{"cluster_name": "growing", "max_workers": 2 * len(kinds)},
        **{"provider": provider, "idle_timeout_minutes": idle},
        "available_node_types": {"ray.head.default": head, **types},
        **{"head_node_type": "ray.head.default", "auth": {}, "file_mounts": {}},
        **{"setup_commands": [], "head_setup_commands": [], "worker_setup_commands": []},
        **{"initialization_commands": [], "head_start_ray_commands": []},
        **{"worker_start_ray_commands": [], "cluster_synced_files": []},
        **{"file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": []},
        **{"upscaling_speed": 1.0, "docker": {}},
    }
    path = folder / "autoscaling.json"
    path.write_text(json.dumps(config))
    settings = {
        **{"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
        **{"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD},
        **{"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_NODE_TYPE_NAME": "ray.head.default"},
        **{"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
    }
    log = open(folder / "ray.log", "wb")  # noqa: SIM115 - as long as the head
    flags = {
        **{"port": port, "num-cpus": cpus, "num-gpus": 0, "autoscaling-config": path},
        **{"include-dashboard": dashboard, "dashboard-port": free_port()},
        **{"ray-client-server-port": free_port()},
    }
    process = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
            *(f"--{name}={value}" for name, value in flags.items()),
        ],
        env={**without_ray_settings(), **settings},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    started = psutil.Process(process.pid)
    yield address
    family = started.children(recursive=True)
    nodes = [p for p in psutil.process_iter() if address in " ".join(safe_cmdline(p))]
    for one in [started, *family, *nodes]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    log.close()


def own_address() -> str:
    """Of this node, as Ray has it; asked in a process of its own (see conftest)."""
    script = "import ray.util; print(ray.util.get_node_ip_address())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=without_ray_settings(),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()[-1]


def safe_cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
