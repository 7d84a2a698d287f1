"""ddp: a whole model on every worker; gradients are averaged in the last turn of a step."""

from __future__ import annotations

import heapq
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raysft.config.schema import Config
from raysft.parallel.native import Native
from raysft.parallel.strategy import State, trainable
from raysft.parallel.world import World


class Ddp(Native):
    """DistributedDataParallel, or the bare module where there is no process group."""

    def __init__(self, config: Config, module: nn.Module, world: World) -> None:
        module = module.to(world.device)
        if dist.is_initialized() and world.size > 1:
            # Buffers are the same everywhere: nothing in these models updates them in training.
            module = DistributedDataParallel(
                module, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            _settle_buckets(module)
        super().__init__(config, module, world)

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        """Turns before the last one keep their gradients to themselves."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    def state(self) -> State:
        """See `Strategy.state`: of what all workers have, each gives its share."""
        return share_of(super().state(), self.world)

    def whole(self) -> AbstractContextManager[object]:
        """Parameters are whole already."""
        return nullcontext()


def share_of(state: State, world: World) -> State:
    """The tensors of `state`, the same on every worker, that this one writes: about as many bytes
    as each other. No section that has become empty: it would be saved as one."""
    loads = [(0, rank) for rank in range(world.size)]

    def mine(part: State) -> State:
        found: State = {}
        for name, value in part.items():
            if isinstance(value, dict):
                kept = mine(value)
                if kept or not value:
                    found[name] = kept
                continue
            load, owner = loads[0]
            size = value.numel() * value.element_size() if torch.is_tensor(value) else 0
            heapq.heapreplace(loads, (load + size, owner))
            if owner == world.rank:
                found[name] = value
        return found

    return mine(state)


def _settle_buckets(module: DistributedDataParallel) -> None:
    """Let DDP deal gradients to buckets for good, in the order of its parameters.

    It does so after its first synchronised backward, by the order in which gradients came: the
    first step after every start would be added up in another order than the same step of a run
    that was not interrupted, and with three workers or more in other bits. So that backward is one
    of zeros, through no layer. Costs an all-reduce; overlap with the backward pass stays.
    """
    wrapped, parameters = module.module, trainable(module)

    def touch() -> torch.Tensor:
        # Of a chain of sums the last term gets its gradient first.
        return sum((p.sum() * 0 for p in parameters), torch.zeros((), device=parameters[0].device))

    wrapped.forward = touch  # of this module, before that of its class
    try:
        module().backward()
    finally:
        del wrapped.forward
    module.zero_grad(set_to_none=True)
