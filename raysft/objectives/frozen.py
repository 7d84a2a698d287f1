"""The reference: the model as its run began, to ask for log-probabilities.

What does not train is the same in both, so only what trains is kept, in each worker's share of it:
of all weights as much again, of adapters next to nothing. For a pass without gradients the kept
weights change places with those that train, and change back. Adapters of layers as they begin
change nothing, so that the reference is then the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Protocol, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class Frozen:
    """The weights that train, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        """module: as a strategy has it, with the weights that its run begins with."""
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._kept = [_own(p).detach().clone() for p in self._trained]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the model computes with the kept weights. No gradient may be on its way, and
        nothing that is gathered of weights may outlast it (`Strategy.whole` sees to that)."""
        self._change()
        try:
            yield
        finally:
            self._change()

    @torch.no_grad()
    def _change(self) -> None:
        # What zero3 has at hand of small weights is of before; on all workers it is the same ones.
        gathered = [found for p in self._trained if (found := _gathered(p)) is not None]
        if gathered:
            gathered[0].partition(gathered)
        for parameter, kept in zip(self._trained, self._kept, strict=True):
            own = _own(parameter)
            moved = own.clone()
            own.copy_(kept)
            kept.copy_(moved)
        if gathered:
            gathered[0].all_gather(gathered)


class _Hidden(Protocol):
    """A weight under zero3, whose data is there while a module computes with it."""

    ds_tensor: torch.Tensor
    ds_status: Enum

    def partition(self, of: list[_Hidden]) -> None:
        """Let go of it, but for this worker's share, ds_tensor."""

    def all_gather(self, of: list[_Hidden]) -> None:
        """Gather it of all shares. A collective."""


def _hidden(parameter: torch.Tensor) -> _Hidden | None:
    return cast(_Hidden, parameter) if hasattr(parameter, "ds_tensor") else None


def _gathered(parameter: torch.Tensor) -> _Hidden | None:
    found = _hidden(parameter)
    return found if found is not None and found.ds_status.name == "AVAILABLE" else None


def _own(parameter: torch.Tensor) -> torch.Tensor:
    """This worker's share of a weight, in place."""
    if (hidden := _hidden(parameter)) is not None:
        return hidden.ds_tensor.detach()
    local = parameter.detach()
    return local.to_local() if isinstance(local, DTensor) else local
