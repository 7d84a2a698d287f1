"""cluster/leave.py: a node that is to go says so to Ray, at once or when a cloud gives notice."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from tests.cluster.conftest import PYTHON, ROOT

SCRIPT = str(ROOT / "cluster" / "leave.py")

CLUSTER = """
import json, os, subprocess, sys, time
import ray
from ray.cluster_utils import Cluster

cluster = Cluster()
cluster.add_node(num_cpus=1, include_dashboard=False)
ray.init(address=cluster.address, log_to_driver=False)
node = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.2")
cluster.wait_for_nodes()

@ray.remote(num_cpus=1, label_selector={"ray.io/node-id": node.node_id})
def work():
    time.sleep(6)

busy = work.remote()
time.sleep(2)
command = [sys.executable, *json.loads(os.environ["COMMAND"]), "--node-ip", "127.0.0.2",
           "--address", cluster.address]
begun = time.time()
told = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
draining = {}
while not draining and told.poll() is None and time.time() < begun + 30:
    draining = ray._private.state.state.get_draining_nodes()
    time.sleep(0.1)
left = time.time() - begun
out, errors = told.communicate()
print(json.dumps({
    "right": list(draining) == [node.node_id], "told": left, "waited": time.time() - begun,
    "left": (min(draining.values()) / 1000 - begun) if draining else 0,
    "code": told.returncode, "said": out + errors,
}), flush=True)
os._exit(0)
"""


class Machine(BaseHTTPRequestHandler):
    """The metadata of a machine of either cloud."""

    taken: ClassVar[threading.Event] = threading.Event()
    asked: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200, "secret")

    def do_GET(self) -> None:
        self.asked.append(self.path)
        gone = self.taken.is_set()
        if self.path == "/latest/meta-data/spot/instance-action":
            allowed = self.headers["X-aws-ec2-metadata-token"] == "secret"
            notice = json.dumps({"action": "terminate", "time": "2030-01-01T00:00:00Z"})
            self._answer(200 if gone and allowed else 404 if allowed else 401, notice)
        elif self.path == "/computeMetadata/v1/instance/preempted":
            allowed = self.headers["Metadata-Flavor"] == "Google"
            self._answer(200 if allowed else 403, "TRUE" if gone else "FALSE")
        else:
            self._answer(400, "")

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def machine() -> Iterator[str]:
    Machine.taken.clear()
    Machine.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Machine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("when", ["now", "aws", "gcp"])
def test_ray_is_told_when_this_node_goes_and_until_when(
    spawn: Callable[..., subprocess.Popen[str]], machine: str, when: str
) -> None:
    command = json.dumps([SCRIPT, when, "--seconds", "40"])
    settings = {"RAYSFT_METADATA": machine, "RAYSFT_NOTICE_EVERY_S": "0.2", "COMMAND": command}
    process = spawn(CLUSTER, RAY_AUTH_MODE="disabled", **settings)
    if when != "now":
        end = time.monotonic() + 90
        while len(Machine.asked) < 3 and time.monotonic() < end:
            time.sleep(0.1)
        Machine.taken.set()
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors[-3000:]
    found = json.loads(output.splitlines()[-1])
    assert found["right"], found
    assert found["code"] == 0, found["said"]
    assert 30 < found["left"] < 70  # 40 s from when it was told
    assert found["waited"] < 35  # no longer than the node had work


def test_without_an_address_it_says_what_is_missing() -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run([PYTHON, SCRIPT, "now"], env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert "RAY_ADDRESS is not set" in done.stderr
