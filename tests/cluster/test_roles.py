"""Who does what on a cluster: data are read on the nodes without a GPU, trainers have the others to
themselves; nodes for data come from an autoscaler when they are needed, and leave; a cluster that
loses the last of them goes on. GPUs are such that only Ray believes in."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.run.lines import read_lines
from tests.cluster.conftest import ROOT
from tests.support.models import CAUSAL

pytestmark = pytest.mark.timeout(400)

# A node with a GPU and one without; each example's id becomes that of the node it was read on.
FIXED = """
import dataclasses, json, os, tempfile
from pathlib import Path
import numpy as np, ray
from ray.cluster_utils import Cluster
from raysft.config import Config
from raysft.config.schema import Data, Model, Source
from raysft.data.encode import make_encoder
from raysft.data.index.build import build_index
from raysft.data.read import stream
from raysft.data.read.reader import Work
from raysft.data.read.stream import RayReader, ReaderSpec
from raysft.driver.shares import Shares

class Told:
    def __init__(self, encoder):
        self.encoder = encoder
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.encoder, name)
    def __reduce__(self):
        return Told, (self.encoder,)
    def encode(self, *args, **settings):
        sequence = self.encoder.encode(*args, **settings)
        return dataclasses.replace(sequence, id=ray.get_runtime_context().get_node_id())

stream.NOTHING_S, stream.CHUNK, stream.LARGE = 2.0, 6, 12
cluster = Cluster()
gpus = [cluster.add_node(num_cpus=4, num_gpus=1, include_dashboard=False)]
ray.init(address=cluster.address, log_to_driver=False)
cpus = cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
folder = Path(tempfile.mkdtemp())
said = [[("user", f"number {n}?"), ("assistant", str(n))] for n in range(40)]
lines = [{"messages": [dict(zip(("role", "content"), turn)) for turn in turns]} for turns in said]
(folder / "train.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
model = {"config": {"model_type": "llama"}, "tokenizer": "bytes"}
source = Source(path=str(folder / "train.jsonl"))
encoder = make_encoder(Model(**model), Data(), folder)
index = build_index([source], "train", encoder, folder, workers=1)

def shares(**parallel):
    return Shares.of(Config.model_validate({
        "run": {"name": "where", "storage_path": str(folder)},
        "data": {"train": [{"path": "x"}]}, "model": model, "parallel": parallel,
    }))

def works():
    return [Work(0, step, 0, np.arange(step % 36, step % 36 + 4)) for step in range(100)]

found = shares()
spec = ReaderSpec((index.place,), ray.put(Told(encoder)), 10_000, 0)
reader = RayReader(
    spec, index.seconds, found.data_cpus + 2, found.readers.selector(), found.readers.elsewhere
)
names = {gpus[0].node_id: "gpu", cpus.node_id: "cpu"}
batches = list(reader.read(iter(works()[:50])))
if os.environ.get("LOSE"):
    cluster.remove_node(cpus, allow_graceful=False)
batches += reader.read(iter(works()[50:]))
print(json.dumps({
    "apart": found.readers.apart, "cpus": found.data_cpus, "threads": found.threads,
    "few": shares(workers=1, device="cpu").readers.apart,
    "steps": [batch.step for batch in batches],
    "on": [sorted({names[name] for name in batch.ids}) for batch in batches],
}), flush=True)
os._exit(0)  # Ray's threads would speak of nodes that are gone
"""


def told(done: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = done.communicate(timeout=300)
    assert done.returncode == 0, f"{output[-3000:]}\n{errors[-3000:]}"
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
def test_nothing_is_read_where_a_gpu_is_while_other_nodes_can(
    spawn: Callable[..., subprocess.Popen[str]],
) -> None:
    found = told(spawn(FIXED))
    assert found["on"] == [["cpu"]] * 100  # though two more tasks wait than it has CPUs
    assert found["steps"] == list(range(100))
    assert (found["apart"], found["few"]) == (True, False)  # on CPUs all share
    assert (found["cpus"], found["threads"]) == (2.0, 4)  # of the GPU's node, all


@pytest.mark.slow
def test_where_the_last_of_those_nodes_is_lost_data_are_read_beside_the_gpus(
    spawn: Callable[..., subprocess.Popen[str]],
) -> None:
    found = told(spawn(FIXED, LOSE="1"))
    assert found["steps"] == list(range(100))
    assert found["on"] == [["cpu"]] * 50 + [["gpu"]] * 50


# Trains as a user does, and looks at the cluster meanwhile, and at Ray's record of its tasks.
TRAIN = """
import json, os, subprocess, sys, threading, time
import ray
from ray.util.state import list_tasks

address = os.environ["ADDRESS"]
ray.init(address=address, log_to_driver=False)
kinds, seen, done = {}, [], threading.Event()

def look():
    there = [node for node in ray.nodes() if node["Alive"] and node["Labels"]]
    for node in there:
        has = node["Resources"]  # labels do not tell: Ray's fake nodes have the head's
        kind = "readers" if "CPU" in has else "head"
        kinds[node["NodeID"]] = "trainers" if "GPU" in has else kind
    return sorted(kinds[node["NodeID"]] for node in there)

def watch():
    while not done.wait(0.5):
        seen.append(look())

before = look()
threading.Thread(target=watch, daemon=True).start()
said = os.path.join(os.environ["FOLDER"], "said.txt")
with open(said, "w") as stream:
    run = subprocess.run(
        [sys.executable, *json.loads(os.environ["COMMAND"])], stdout=stream, stderr=stream,
        env={**os.environ, "RAY_ADDRESS": address}, cwd=os.environ["FOLDER"],
    )
tasks = list_tasks(filters=[("name", "=", "read_micro_batches")], limit=9000, detail=True)
deadline = time.monotonic() + 90
while look() != before and time.monotonic() < deadline:
    time.sleep(0.5)
done.set()
print(json.dumps({
    "code": run.returncode, "said": open(said).read(),
    "before": before, "after": look(), "most": max(seen, key=len),
    "read_on": sorted(kinds[task.node_id] for task in tasks if task.node_id),
    "trained_on": sorted({
        kinds[actor.node_id] for actor in ray.util.state.list_actors(
            filters=[("class_name", "=", "RayTrainWorker")], limit=100)
    }),
}), flush=True)
os._exit(0)
"""

# What the machine has not: workers that were given a GPU of Ray's compute on the CPU.
PLUGIN = """
import torch
from raysft import worker
from raysft.driver import group

group.GPU_BACKENDS = "gloo"
worker.device_of = lambda config, gpu=None: torch.device("cpu")
"""

KINDS = {
    **{"head": 0, "idle": 0.3, "dashboard": True},
    **{"readers": {"CPU": 2}, "trainers": {"CPU": 4, "GPU": 1}},
}


@pytest.mark.slow
@pytest.mark.parametrize("growing_cluster", [KINDS], indirect=True)
def test_from_no_nodes_a_run_gets_some_to_read_and_some_to_train_and_all_leave(
    spawn: Callable[..., subprocess.Popen[str]], growing_cluster: str, tmp_path: Path
) -> None:
    (tmp_path / "no_gpus.py").write_text(PLUGIN)
    corpus = tmp_path / "corpus.jsonl"
    turns = [("user", "which number?"), ("assistant", "this one")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    corpus.write_text("".join(json.dumps({"id": f"{n}", **record}) + "\n" for n in range(200)))
    tree = {
        "plugins": ["no_gpus"],
        "run": {"name": "run", "storage_path": str(tmp_path)},
        "data": {"train": [str(corpus)], "lanes": 2, "tokens_per_batch": 256},
        "model": CAUSAL,
        "parallel": {"workers": 2},
        "train": {"max_steps": 40, "precision": "fp32"},
        "log": {"every": 5, "tensorboard": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    command = json.dumps([str(ROOT / "jobs" / "sft.py"), "config.yaml"])
    settings = {"ADDRESS": growing_cluster, "COMMAND": command, "FOLDER": str(tmp_path)}
    found = told(spawn(TRAIN, RAY_AUTH_MODE="disabled", RAY_enable_autoscaler_v2="1", **settings))
    assert found["code"] == 0, found["said"]
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 40
    assert found["before"] == ["head"]
    assert "waiting for GPUs: 2 wanted" in found["said"]
    assert "No available node types" not in found["said"]  # for tasks that wait their turn
    assert {"readers", "trainers"} < set(found["most"])
    assert found["most"].count("trainers") == 2
    assert set(found["read_on"]) == {"readers"} and len(found["read_on"]) >= 2
    assert found["trained_on"] == ["trainers"]
    assert found["after"] == found["before"]
