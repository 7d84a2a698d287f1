"""The group of training workers, as the loop sees it: rank, size, device and a few collectives.

Everything also works for one process without a process group, so the training core runs in tests,
on laptops and under any launcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")


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

    def sum(self, values: Sequence[float]) -> torch.Tensor:
        """Sum a short list of numbers over all workers, in float64, on the device."""
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64, device=self.device))

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until every worker is here."""
        self.sum([0.0]).cpu()

    def gather(self, value: _T) -> list[_T]:
        """Every worker's value, in rank order, on every worker."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values
