"""A cluster that has too few GPUs now and whose autoscaler may add some: they are asked for, waited
for, and that is said now and then; a run that could have GPUs does not train on CPUs in silence.

The demand is a placement group of this process: who asks is gone, and so is what was asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ray
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    remove_placement_group,
)

from raysft.config import Config
from raysft.errors import UserError
from raysft.run.ownership import ANYONE, Permit

log = logging.getLogger(__name__)

TELL_S = 30.0  # between two lines that say what is waited for
ANSWER_S = 60.0  # within which an autoscaler that can add a node has begun to
_V1_STATUS = b"__autoscaling_status"
_FOUND = re.compile(r"node_[0-9a-f]{20,}")  # what Ray calls a node that no autoscaler has started


@dataclass(frozen=True)
class Autoscaler:
    """What the cluster's autoscaler says. grows: it starts nodes itself. refused: it has no kind of
    node for a GPU that is asked for; refused_cpus: for CPUs. begun: it starts nodes now, or has
    tried to."""

    grows: bool
    refused: bool = False
    begun: bool = False
    refused_cpus: bool = False

    @classmethod
    def now(cls) -> Autoscaler:
        """Of the cluster that this process has joined."""
        from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

        reply = GetClusterStatusReply()
        reply.ParseFromString(
            ray._private.worker.global_worker.gcs_client.get_cluster_status(timeout_s=10)
        )
        state = reply.autoscaling_state
        if state.autoscaler_state_version:
            kinds = [node.ray_node_type_name for node in reply.cluster_resource_state.node_states]
            refused = [
                one.resources_bundle
                for group in state.infeasible_gang_resource_requests
                for part in [group, *group.bundle_selectors]
                for one in (part.requests if part is group else part.resource_requests)
            ]
            begun = [*state.pending_instances, *state.pending_instance_requests]
            return cls(
                any(kind and not _FOUND.fullmatch(kind) for kind in kinds),
                any(bundle.get("GPU", 0) for bundle in refused),
                bool(begun or state.failed_instance_requests),
                any(not bundle.get("GPU", 0) for bundle in refused),
            )
        found = json.loads(_internal_kv_get(_V1_STATUS) or b"{}").get("autoscaler_report") or {}
        kinds = [str(kind) for kind in found.get("active_nodes", {})]
        begun = [found.get(key) for key in ("pending_nodes", "pending_launches", "failed_nodes")]
        return cls(any(not _FOUND.fullmatch(kind) for kind in kinds), False, any(begun))


def gpus() -> float:
    """Of all nodes that are there now."""
    return float(ray.cluster_resources().get("GPU", 0.0))


def expected(config: Config) -> bool:
    """Whether the cluster has too few GPUs for `config`, and an autoscaler that may add some."""
    parallel = config.parallel
    if parallel.device == "cpu" or gpus() >= parallel.min_workers + config.evaluate.apart:
        return False
    return Autoscaler.now().grows


@contextlib.contextmanager
def held(config: Config) -> Iterator[PlacementGroup]:
    """GPUs for the workers of `config`, meanwhile this process's: asked for, and then kept from
    leaving as idle."""
    each = config.parallel.cpus_per_worker or 1.0
    bundles = [{"CPU": each, "GPU": 1.0}] * (config.parallel.min_workers + config.evaluate.apart)
    group = placement_group(bundles, strategy="PACK")
    try:
        yield group
    finally:
        remove_placement_group(group)


def wait(config: Config, say: Callable[[str], None], permit: Permit = ANYONE) -> None:
    """Until there are GPUs for the workers of `config`, where they are to be expected; or until it
    is certain that none will come: `Shares.of` then says what that means.

    permit: asked meanwhile. Raises UserError where there could be some, but not so many.
    """
    if not expected(config):
        return
    wanted = config.parallel.min_workers + config.evaluate.apart
    begun, told = time.monotonic(), -TELL_S
    with held(config) as group:
        while not group.wait(1.0):
            permit.require()
            now, found = time.monotonic(), Autoscaler.now()
            if found.refused or (now - begun > ANSWER_S and not found.begun and not gpus()):
                _told_none(config, wanted)
                return
            if now - told >= TELL_S:
                told = now
                say(
                    f"waiting for GPUs: {wanted} wanted, {gpus():g} there after "
                    f"{now - begun:.0f} s; the cluster's autoscaler was asked "
                    "(parallel.device=cpu trains without)"
                )
    say(f"{gpus():g} GPUs are there")


def _of_them(config: Config) -> str:
    apart = config.evaluate.apart
    return f" ({apart} of them evaluate.workers)" if apart else ""


def _told_none(config: Config, wanted: int) -> None:
    if gpus() or config.parallel.min_workers > 1:
        raise UserError(
            f"parallel.workers: {wanted} workers{_of_them(config)} need a GPU each, and the "
            "cluster's autoscaler "
            f"adds no more to the {gpus():g} there are; use fewer, or parallel.device=cpu"
        )
    if config.parallel.device == "auto":
        log.warning(
            "parallel.device: auto: the cluster has no GPU and its autoscaler adds none: training "
            "on CPUs; parallel.device=cpu says so from the start"
        )
