"""Workers know which of them share a node, and a copy of the model is sharded over those."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

# Two nodes with GPUs that only Ray believes in: the group is ours, its process group gloo's.
SCRIPT = """
import json, os, tempfile
from pathlib import Path
import ray, ray.train, ray.train.torch
from ray.cluster_utils import Cluster
from raysft.config import Config
from raysft.driver.group import make_trainer
from raysft.driver.shares import Shares
from raysft.driver.placed import place
from raysft.errors import UserError

@ray.remote(num_cpus=0)
class Told:
    def tell(self, said):
        self.said = said
    def get(self):
        return self.said

def work(settings):
    from raysft.parallel import World
    from raysft.parallel.fsdp import _mesh
    world = World.current()
    where = world.gather(ray.get_runtime_context().get_node_id())
    mesh = _mesh(2, world)
    addresses = world.gather(ray.util.get_node_ip_address())
    said = {"ray": where, "at": addresses, "ours": world.nodes(), "mesh": mesh.mesh.tolist()}
    said["shards"] = world.gather(mesh["shard"].mesh.tolist())
    if world.is_main:
        ray.get(settings["told"].tell.remote(said))

cluster = Cluster()
cluster.add_node(num_cpus=2, include_dashboard=False)
ray.init(address=cluster.address, log_to_driver=False)
for _ in range(2):
    cluster.add_node(num_cpus=4, num_gpus=2)
cluster.wait_for_nodes()
config = Config.model_validate({
    "run": {"name": "where", "storage_path": tempfile.mkdtemp()},
    "data": {"train": [{"path": "x"}], "cpus": 1},
    "model": {"config": {"model_type": "llama"}, "tokenizer": "bytes"},
    "parallel": {"workers": 4},
})
folder = Path(config.run.storage_path)
told = Told.remote()
made = make_trainer("where", work, {}, config, Shares.of(config), folder,
                    workers=4, log_level="CRITICAL")
ray.train.torch.TorchTrainer(
    work, train_loop_config={"told": told},
    torch_config=ray.train.torch.TorchConfig(backend="gloo"),
    scaling_config=made.scaling_config,
    run_config=ray.train.RunConfig(name="where", storage_path=str(folder)),
).fit()
said = ray.get(told.get.remote())
one = place(2)
said |= {"one": [len(set(one.nodes)), one.known]}
try:
    place(4)
except UserError as error:  # no GPU is there to be asked
    said["error"] = str(error)
print(json.dumps(said), flush=True)
ray.shutdown()
cluster.shutdown()
os._exit(0)  # Ray's threads would speak of nodes that are gone
"""


def test_those_of_a_node_shard_a_copy(spawn: Callable[..., subprocess.Popen[str]]) -> None:
    output, errors = (process := spawn(SCRIPT)).communicate(timeout=240)
    assert process.returncode == 0, f"{output[-3000:]}\n{errors[-3000:]}"
    said = json.loads(output.splitlines()[-1])
    assert len(set(said["ray"])) == 2
    for rows in said["mesh"]:  # a copy each
        assert len({said["ray"][rank] for rank in rows}) == 1
        assert len({said["ours"][rank] for rank in rows}) == 1
    # To Ray Train a node is an address, of which nodes of this kind may have one between them.
    assert len(set(said["ours"])) == len(set(zip(said["ours"], said["at"]))) == len(set(said["at"]))
    assert all(rank in group for rank, group in enumerate(said["shards"]))
    assert said["one"] == [1, True]
    assert said["error"].startswith("parallel.replicate: auto: the cluster's GPUs could not be")
