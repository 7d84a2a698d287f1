"""Where workers come to lie: GPU workers on as few nodes as hold them, CPU workers on many; data
tasks on the nodes that `data.nodes` names; and that a cluster which may get GPUs is waited for."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

# Workers that say where they are.
WORK = """
import ray, ray.train

@ray.remote(num_cpus=0)
class Nodes:
    def __init__(self):
        self.of = {}
    def tell(self, rank, node):
        self.of[rank] = node
    def get(self):
        return self.of

def work(settings):
    rank = ray.train.get_context().get_world_rank()
    ray.get(settings["nodes"].tell.remote(rank, ray.get_runtime_context().get_node_id()))
"""

# Four nodes with GPUs that only Ray believes in: the group is ours, its process group gloo's.
SCRIPT = (
    WORK
    + """
import collections, json, os, tempfile
from pathlib import Path
import ray, ray.train, ray.train.torch
from ray.cluster_utils import Cluster
from raysft.config import Config
from raysft.driver.group import make_trainer
from raysft.driver.shares import Shares

workers, gpus = int(os.environ["WORKERS"]), int(os.environ["GPUS"])
cluster = Cluster()
cluster.add_node(num_cpus=2, include_dashboard=False)
ray.init(address=cluster.address, log_to_driver=False)
for _ in range(4):
    cluster.add_node(num_cpus=4, num_gpus=gpus)
cluster.wait_for_nodes()
config = Config.model_validate({
    "run": {"name": "where", "storage_path": tempfile.mkdtemp()},
    "data": {"train": [{"path": "x"}], "cpus": 1},
    "model": {"config": {"model_type": "llama"}, "tokenizer": "bytes"},
    "parallel": {"workers": workers},
})
folder = Path(config.run.storage_path)
nodes = Nodes.remote()
made = make_trainer("where", work, {"nodes": nodes}, config, Shares.of(config), folder,
                    workers=workers, log_level="CRITICAL")
backend = made.backend_config.backend
ray.train.torch.TorchTrainer(
    work, train_loop_config={"nodes": nodes},
    torch_config=ray.train.torch.TorchConfig(backend="gloo"),
    scaling_config=made.scaling_config,
    run_config=ray.train.RunConfig(name="where", storage_path=str(folder)),
).fit()
counts = collections.Counter(ray.get(nodes.get.remote()).values())
print(json.dumps({"backend": backend, "counts": sorted(counts.values())}), flush=True)
ray.shutdown()
cluster.shutdown()
os._exit(0)  # Ray's threads would speak of nodes that are gone
"""
)


# Two nodes, one of them for data; each example's id becomes that of the node it was read on.
DATA_SCRIPT = """
import dataclasses, json, os, tempfile
from pathlib import Path
import numpy as np, ray
from ray.cluster_utils import Cluster
from raysft.config import Config
from raysft.config.schema import Data, Model, Source
from raysft.data.encode import make_encoder
from raysft.data.index.build import build_index
from raysft.data.read.reader import Work
from raysft.data.read.stream import RayReader, ReaderSpec
from raysft.driver.shares import Shares
from raysft.errors import UserError

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

cluster = Cluster()
cluster.add_node(num_cpus=4, include_dashboard=False)
ray.init(address=cluster.address, log_to_driver=False)
data_node = cluster.add_node(num_cpus=2, labels={"pool": "data", "zone": "a"})
cluster.wait_for_nodes()
folder = Path(tempfile.mkdtemp())
said = [[("user", f"number {n}?"), ("assistant", str(n))] for n in range(40)]
lines = [{"messages": [dict(zip(("role", "content"), turn)) for turn in turns]} for turns in said]
(folder / "train.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
model = {"config": {"model_type": "llama"}, "tokenizer": "bytes"}
source = Source(path=str(folder / "train.jsonl"))
encoder = make_encoder(Model(**model), Data(), folder)
index = build_index([source], "train", encoder, folder)
works = [Work(0, step, 0, np.arange(4 * step, 4 * step + 4)) for step in range(10)]

def config(nodes):
    return Config.model_validate({
        "run": {"name": "where", "storage_path": str(folder)},
        "data": {"train": [{"path": "x"}], "nodes": nodes}, "model": model,
    })

nodes = {"pool": "data"}
shares = Shares.of(config(nodes))
spec = ReaderSpec((index.place,), ray.put(Told(encoder)), 10_000, 0)
batches = list(RayReader(spec, index.seconds, shares.data_cpus, nodes).read(iter(works)))
try:
    error = ""
    Shares.of(config({"pool": "nowhere"}))
except UserError as raised:
    error = str(raised)
print(json.dumps({
    "cpus": shares.data_cpus, "error": error, "steps": [batch.step for batch in batches],
    "there": {name for b in batches for name in b.ids} == {data_node.node_id},
}), flush=True)
ray.shutdown()
cluster.shutdown()
os._exit(0)
"""


def told(done: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = done.communicate(timeout=240)
    assert done.returncode == 0, f"{output[-3000:]}\n{errors[-3000:]}"
    return json.loads(output.splitlines()[-1])


def test_workers_with_gpus_fill_whole_nodes(
    spawn: Callable[..., subprocess.Popen[str]],
) -> None:
    found = told(spawn(SCRIPT, WORKERS="8", GPUS="4"))
    assert found == {"backend": "cpu:gloo,cuda:nccl", "counts": [4, 4]}


def test_workers_on_cpus_are_spread(spawn: Callable[..., subprocess.Popen[str]]) -> None:
    found = told(spawn(SCRIPT, WORKERS="4", GPUS="0"))
    assert found["backend"] == "gloo"
    assert len(found["counts"]) >= 4


def test_data_is_read_on_the_nodes_that_data_nodes_names(
    spawn: Callable[..., subprocess.Popen[str]],
) -> None:
    found = told(spawn(DATA_SCRIPT))
    assert found["there"]
    assert (found["cpus"], found["steps"]) == (2.0, list(range(10)))
    assert "data.nodes: no node of the cluster has the labels {'pool': 'nowhere'}" in found["error"]


# A head without a GPU, and an autoscaler of Ray's own that starts processes for nodes.
GROWING = (
    WORK
    + """
import json, os, tempfile, time
from pathlib import Path
import ray, ray.train, ray.train.torch
from raysft.config import Config
from raysft.driver import growing
from raysft.driver.group import make_trainer
from raysft.driver.shares import Shares
from raysft.errors import UserError

growing.TELL_S = 2.0
ray.init(address=os.environ["ADDRESS"], log_to_driver=False)
deadline = time.monotonic() + 60
while not growing.Autoscaler.now().grows and time.monotonic() < deadline:
    time.sleep(0.5)  # its first answer
config = Config.model_validate({
    "run": {"name": "where", "storage_path": tempfile.mkdtemp()},
    "data": {"train": [{"path": "x"}], "cpus": 1},
    "model": {"config": {"model_type": "llama"}, "tokenizer": "bytes"},
    "parallel": {"workers": int(os.environ["WORKERS"]), "device": os.environ["DEVICE"]},
})
said, answer = [], {"before": growing.gpus(), "expected": growing.expected(config)}
try:
    growing.wait(config, said.append)
    shares = Shares.of(config)
    answer |= {"gpu": shares.gpu, "threads": shares.threads}
except UserError as error:
    answer["error"] = str(error)
answer |= {"said": said, "after": growing.gpus()}
if answer.get("gpu"):
    folder = Path(config.run.storage_path)
    nodes = Nodes.remote()
    made = make_trainer("where", work, {"nodes": nodes}, config, shares, folder,
                        workers=config.parallel.max_workers, log_level="CRITICAL")
    ray.train.torch.TorchTrainer(
        work, train_loop_config={"nodes": nodes},
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        scaling_config=made.scaling_config,
        run_config=ray.train.RunConfig(name="where", storage_path=str(folder)),
    ).fit()
    gpus = {n["NodeID"]: n["Resources"].get("GPU", 0) for n in ray.nodes()}
    answer["on"] = [gpus[node] for _, node in sorted(ray.get(nodes.get.remote()).items())]
print(json.dumps(answer), flush=True)
os._exit(0)
"""
)


def grown(
    spawn: Callable[..., subprocess.Popen[str]], address: str, workers: int, device: str
) -> dict[str, Any]:
    environ = {"ADDRESS": address, "WORKERS": str(workers), "DEVICE": device}
    return told(spawn(GROWING, RAY_AUTH_MODE="disabled", RAY_enable_autoscaler_v2="1", **environ))


@pytest.mark.parametrize("growing_cluster", [{"added": {"CPU": 8, "GPU": 2}}], indirect=True)
def test_a_cluster_that_has_no_gpu_yet_is_waited_for_and_then_used(
    spawn: Callable[..., subprocess.Popen[str]], growing_cluster: str
) -> None:
    found = grown(spawn, growing_cluster, 2, "auto")
    assert (found["before"], found["expected"]) == (0, True)
    assert (found.get("gpu"), found["after"]) == (True, 2), found
    first, *_, last = found["said"]
    assert first.startswith("waiting for GPUs: 2 wanted, 0 there after ")
    assert last == "2 GPUs are there"
    assert found["on"] == [2, 2]  # both where the GPUs are, none on the head
    assert found["threads"] >= 2
    # More than it ever adds: told, and no training on CPUs instead.
    found = grown(spawn, growing_cluster, 7, "auto")
    assert "parallel.workers: 7 workers need a GPU each" in found["error"]


@pytest.mark.parametrize("growing_cluster", [{"added": {"CPU": 4}}], indirect=True)
def test_where_the_autoscaler_has_no_gpus_auto_takes_cpus_and_cuda_is_refused(
    spawn: Callable[..., subprocess.Popen[str]], growing_cluster: str
) -> None:
    assert grown(spawn, growing_cluster, 1, "auto")["gpu"] is False
    assert "no node of the cluster has a GPU" in grown(spawn, growing_cluster, 1, "cuda")["error"]
