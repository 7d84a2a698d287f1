"""Which nodes read: those that `data.nodes` names; else, where trainers have GPUs, nodes without
one, so that trainers keep the cores of theirs; else any.

Trainers ask for GPUs, so they lie where those are. Data tasks are kept off such nodes by a label
selector of Ray, which its autoscaler understands too: it starts nodes for tasks that wait, and ends
them once they are idle. Ray's own fallback for a selector is of no use here: it is taken as soon as
the nodes wanted are busy.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raysft.config import Config
from raysft.driver import growing
from raysft.driver.growing import Autoscaler
from raysft.run.ownership import ANYONE, Permit

log = logging.getLogger(__name__)

# What Ray labels nodes with: the kind its autoscaler started, and each node's own id.
GROUP, NODE = "ray.io/node-group", "ray.io/node-id"
CPUS_A_GPU = 8.0  # for data tasks at most, where nodes come when they are asked for
ENOUGH = 2  # CPUs a worker of which nodes without a GPU have to be, to read alone
MOST_ASKED = 64  # CPUs that are waited for before workers start; tasks ask for the rest
WITHIN_S = 300.0  # GPUs are there and paid for meanwhile


@dataclass(frozen=True)
class Readers:
    """labels: of the nodes that read. apart: they are those without a GPU. grows: more of them come
    when they are asked for."""

    labels: dict[str, str] = field(default_factory=dict)
    apart: bool = False
    grows: bool = False

    @classmethod
    def of(cls, config: Config, gpu: bool) -> Readers:
        """Of the cluster as it is. gpu: whether trainers have GPUs."""
        labels = config.data.nodes
        apart = gpu and not labels and sum(cpus_apart().values()) >= _wanted(config)
        return cls(labels, apart, bool(labels or apart) and Autoscaler.now().grows)

    def cpus(self) -> dict[str, float]:
        """CPUs, in use or not, by id of the living nodes that may read."""
        return cpus_apart() if self.apart else cpus_of(self.labels)

    def selector(self) -> dict[str, str]:
        """Of the nodes that may read, for Ray; {}: of any."""
        return selector_apart() if self.apart else self.labels

    def elsewhere(self) -> dict[str, str]:
        """As `selector`, asked when nothing came for long: of any node, where the last of those
        without a GPU is gone."""
        if not self.apart or cpus_apart():
            return self.selector()
        log.warning(
            "no node without a GPU is left: data are read on the trainers' nodes until workers "
            "start again"
        )
        return {}


def expected(config: Config) -> bool:
    """Whether nodes that read are missing, and an autoscaler may add some."""
    if config.data.nodes:
        there = cpus_of(config.data.nodes)
    elif config.parallel.device != "cpu" and growing.gpus():
        there = cpus_apart()
    else:
        return False
    return sum(there.values()) < _wanted(config) and Autoscaler.now().grows


def wait(config: Config, say: Callable[[str], None], permit: Permit = ANYONE) -> None:
    """Ask for nodes that read where they are `expected`, until they are there or it is clear that
    none will come soon: `Shares.of` then says what that means. To be called once GPUs are there.

    permit: asked meanwhile.
    """
    if not expected(config):
        return
    wanted = _wanted(config)
    selector = config.data.nodes or selector_apart()
    # A process that asks is gone, and so is what it asked for: see `growing`.
    group = placement_group([{"CPU": 1.0}] * wanted, bundle_label_selector=[selector] * wanted)
    say(f"waiting for nodes that read data: {wanted} CPUs, of the cluster's autoscaler")
    gpu = config.parallel.device != "cpu" and growing.gpus() > 0
    begun = time.monotonic()
    try:
        with growing.held(config) if gpu else contextlib.nullcontext():
            while not group.wait(1.0) and expected(config):
                permit.require()
                passed, found = time.monotonic() - begun, Autoscaler.now()
                idle = passed > growing.ANSWER_S and not found.begun
                if found.refused_cpus or idle or passed > WITHIN_S:
                    say("none came: data are read on the trainers' nodes")
                    return
    finally:
        remove_placement_group(group)


def _wanted(config: Config) -> int:
    return min(MOST_ASKED, config.data.cpus or ENOUGH * config.parallel.min_workers)


def cpus_of(labels: Mapping[str, str]) -> dict[str, float]:
    """CPUs, in use or not, by id of the living nodes that carry these labels."""
    return {
        node["NodeID"]: float(node["Resources"].get("CPU", 0))
        for node in ray.nodes()
        if node["Alive"] and labels.items() <= (node["Labels"] or {}).items()
    }


def cpus_apart() -> dict[str, float]:
    """CPUs, in use or not, by id of the living nodes that have some and no GPU."""
    return {
        node["NodeID"]: float(node["Resources"]["CPU"])
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) and not _has_gpu(node["Resources"])
    }


def selector_apart() -> dict[str, str]:
    """Label selector of the nodes without a GPU; {} where no node has one.

    By the kinds of nodes where an autoscaler has started them, which holds for those to come; else
    by the ids of those there are.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    for label in (GROUP, NODE):
        kinds: dict[bool, set[str | None]] = {True: set(), False: set()}
        for node in nodes:
            kinds[_has_gpu(node["Resources"])].add((node["Labels"] or {}).get(label))
        named = sorted(kind for kind in kinds[True] if kind)
        if named and len(named) == len(kinds[True]) and not kinds[True] & kinds[False]:
            return {label: f"!in({','.join(named)})"}
    return {}


def _has_gpu(resources: Mapping[str, float]) -> bool:
    return resources.get("GPU", 0) > 0
