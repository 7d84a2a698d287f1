"""The group of training workers, as the loop sees it: rank, size, device and a few collectives.

Everything also works for one process without a process group, so the training core runs in tests,
on laptops and under any launcher.

Sums travel by the group that training has (NCCL on GPUs), which gives up after
`parallel.timeout_s`. What workers tell each other beside the steps, and what they wait for while
one of them works for all (cuts the ledger, reads a checkpoint, publishes one), goes by a group of
its own on CPUs, `host_group`, which does not: whoever works is watched by its own watchdog, and
that a worker has died is seen by its connection and by Ray.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")

HOST_TIMEOUT = timedelta(days=1)
"""What no chore takes, on a store of any speed."""

_LONGEST_PAUSE = 0.2  # seconds between two looks at a barrier
_host: dist.ProcessGroup | None = None


def new_host_group() -> dist.ProcessGroup:
    """One more group of all workers on CPUs, for what may take long. A collective."""
    return dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)


def host_group() -> dist.ProcessGroup:
    """That of the training thread; made at the first call. A collective then."""
    global _host
    if _host is not None:
        try:
            dist.get_backend(_host)
        except ValueError:  # of a process group that is no more: tests begin several
            _host = None
    if _host is None:
        _host = new_host_group()
    return _host


@dataclass(frozen=True)
class World:
    """Who this worker is. `device` is where its tensors live."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device | str = "cpu") -> World:
        """The process group that is initialised, or a world of one."""
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), torch.device(device))
        return cls(0, 1, torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this worker writes what is written once a run."""
        return self.rank == 0

    def lanes(self, lanes: int) -> list[int]:
        """The lanes this worker runs: rank, rank + size, ..."""
        return list(range(self.rank, lanes, self.size))

    def turns(self, lanes: int) -> int:
        """Forward passes a step takes on every worker; those beyond its lanes have weight zero."""
        return -(-lanes // self.size)

    def nodes(self) -> list[str]:
        """The node of every worker, in rank order, on every worker."""
        number = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK"))  # Ray Train, torchrun
        return self.gather(socket.gethostname() if number is None else number)

    def sum(self, values: Sequence[float]) -> torch.Tensor:
        """Sum a short list of numbers over all workers, in float64, on the device."""
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64, device=self.device))

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until every worker is here, however long one is busy; calls `waiting` meanwhile."""
        if self.size == 1:
            return
        arrived = dist.barrier(group=host_group(), async_op=True)
        pause = 0.0005
        while not arrived.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            waiting()
        arrived.wait()

    def gather(self, value: _T) -> list[_T]:
        """Every worker's value, in rank order, on every worker. Of few bytes: each gets all."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value, group=host_group())
        return values

    def gather_main(self, value: _T) -> list[_T]:
        """Every worker's value, in rank order, on rank 0; [] on the others."""
        if self.size == 1:
            return [value]
        values = [value] * self.size if self.is_main else []
        dist.gather_object(value, values or None, group=host_group())
        return values

    def share(self, value: _T) -> _T:
        """Rank 0's value, on every worker."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=host_group())
        return values[0]
