"""What a start needs, had before it is needed: libraries in this process, and processes of Ray.

A small run's way to its first step is import statements: torch, transformers and Ray's libraries
take a process 5 to 10 s on a laptop, and one process waits for the next. So this process imports
while Ray starts, and Ray's processes (controller, workers, data tasks) are started, and import,
while this one reads, proves and plans: in an embedded Ray; a cluster's nodes have their own time.
Nothing here changes what a run does: what is not ready is made when it is needed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import ray

from raysft import preload
from raysft.config import Config
from raysft.driver.shares import Shares, train_environment, worker_environment

log = logging.getLogger(__name__)

KEPT_S = 120  # a process that is not needed after all
HELPERS = 2  # actors that Ray Train's controller starts before workers


def processes(config: Config) -> None:
    """Have Ray start processes for a run that is about to begin.

    What Ray has for this is no part of its public interface: where another version has it not, or
    otherwise, they start later.
    """
    if preload.MARK not in os.environ:
        return
    try:
        _start(config)
    except Exception as error:  # noqa: BLE001 - whatever an interface raises that may change
        log.debug("no processes are started ahead: %s", error)


def _start(config: Config) -> None:
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    get_or_create_autoscaling_coordinator()
    Path(os.environ[preload.MARK]).unlink(missing_ok=True)  # of the trial before
    inherited = dict(ray.get_runtime_context().runtime_env)
    controller = {preload.CONTROLLER_HAS: "0", **train_environment(config)}
    controller |= get_env_vars_to_propagate()
    worker = {**controller, **worker_environment(config, Shares.of(config))}
    _prestart(1 + HELPERS, _as_ray_writes(inherited, controller, merged=bool(inherited)))
    workers = min(config.parallel.max_workers, os.cpu_count() or 1)
    _prestart(workers, _as_ray_writes(inherited, worker, merged=True))
    reader = {**worker, **preload.READER}
    _prestart(1, _as_ray_writes(inherited, reader, merged=True))


def _as_ray_writes(inherited: dict[str, Any], variables: dict[str, str], *, merged: bool) -> str:
    """The environment of a process, letter for letter: Ray takes an idle one by the hash of this.

    merged: with that of a process which has one: written by Ray's C++ part, else by Python.
    """
    given = {**inherited, "env_vars": {**inherited.get("env_vars", {}), **variables}}
    separators = (",", ":") if merged else None
    return json.dumps(given, sort_keys=True, separators=separators, ensure_ascii=not merged)


def _prestart(processes: int, environment: str) -> None:
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import (
        common_pb2,
        node_manager_pb2,
        node_manager_pb2_grpc,
        runtime_environment_pb2,
    )

    context = ray.get_runtime_context()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON,
        job_id=bytes.fromhex(context.get_job_id()),
        runtime_env_info=runtime_environment_pb2.RuntimeEnvInfo(serialized_runtime_env=environment),
        keep_alive_duration_secs=KEPT_S,
        num_workers=processes,
    )
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    with contextlib.closing(channel):
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=5)
