"""The interface of a strategy: wrap, accumulate, clip, and the state of model and optimizer.

State goes through torch's distributed state-dict API, so a checkpoint names parameters as the plain
model does and can be loaded by another strategy or at another world size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
)

from raysft.parallel.world import World


class Strategy(Protocol):
    """What the training loop asks of a strategy."""

    module: nn.Module

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward of one turn; gradients meet in the `last` one only."""
        ...

    def whole(self) -> AbstractContextManager[Any]:
        """Around evaluation: submodules may be called on their own, not through `module`."""
        ...

    def clip(self, max_norm: float) -> torch.Tensor:
        """Norm of the whole gradient before clipping (a 0-d tensor); clips if max_norm > 0."""
        ...


def make_strategy(name: str, module: nn.Module, world: World) -> Strategy:
    """Wrap `module` (on CPU, the same weights on every worker) as `parallel.strategy` says."""
    if name == "fsdp":
        from raysft.parallel.fsdp import Fsdp

        return Fsdp(module, world)
    from raysft.parallel.ddp import Ddp

    return Ddp(module, world)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that receive gradients."""
    return [p for p in module.parameters() if p.requires_grad]


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Model and optimizer state by parameter name; sharded tensors stay sharded."""
    model, optim = get_state_dict(module, optimizer)
    return {"model": model, "optim": optim}


def load_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `state_of`."""
    set_state_dict(
        module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
