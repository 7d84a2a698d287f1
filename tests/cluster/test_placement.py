"""Where workers come to lie: GPU workers on as few nodes as hold them, CPU workers on many; data
tasks on the nodes that `data.nodes` names."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

# Four nodes with GPUs that only Ray believes in: the group is ours, its process group gloo's.
SCRIPT = """
import collections, json, os, tempfile
from pathlib import Path
import ray, ray.train, ray.train.torch
from ray.cluster_utils import Cluster
from raysft.config import Config
from raysft.driver.group import Shares, make_trainer

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
from raysft.driver.group import Shares
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
