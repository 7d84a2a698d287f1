"""Where a run's workers would be, for who asks before they are there: a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ray

from raysft.driver import precision
from raysft.errors import UserError


@dataclass(frozen=True)
class Placed:
    """Where workers would be. nodes: that of each. memory: bytes of the smallest GPU; None: on
    CPUs. known: whether all of these nodes are there."""

    nodes: Sequence[str] = ()
    memory: float | None = None
    known: bool = True


def place(workers: int) -> Placed:
    """So many workers with a GPU each, as they are placed where nothing else runs: on few nodes,
    the largest first. Raises UserError where a node does not answer."""
    gpus = {
        node["NodeID"]: int(node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    }
    most_first = sorted(gpus, key=lambda node: -gpus[node])
    nodes = [node for node in most_first for _ in range(gpus[node])][:workers]
    if len(set(nodes)) < 2:  # how large their GPUs are decides nothing
        return Placed(nodes, known=len(nodes) == workers)
    try:
        sizes = precision.ask(_smallest_gpu)
    except ray.exceptions.RayError as error:
        raise UserError(
            f"parallel.replicate: auto: the cluster's GPUs could not be asked for their memory "
            f"({type(error).__name__}); start again, or set a number"
        ) from error
    return Placed(nodes, min(sizes.values()), len(nodes) == workers)


def _smallest_gpu() -> float:
    """Bytes of the smallest GPU that this process sees."""
    import torch  # here, not above: the driver has no use for it

    devices = range(torch.cuda.device_count())
    return min(float(torch.cuda.get_device_properties(n).total_memory) for n in devices)
