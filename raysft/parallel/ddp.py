"""ddp: a whole model on every worker; gradients are averaged in the last turn of a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raysft.parallel.strategy import trainable
from raysft.parallel.world import World


class Ddp:
    """DistributedDataParallel, or the bare module where there is no process group."""

    def __init__(self, module: nn.Module, world: World) -> None:
        self.module = module.to(world.device)
        if dist.is_initialized() and world.size > 1:
            # Buffers are the same everywhere: nothing in these models updates them in training.
            self.module = DistributedDataParallel(
                self.module, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self._trainable = trainable(self.module)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Turns before the last one keep their gradients to themselves."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    def whole(self) -> AbstractContextManager[Any]:
        """Parameters are whole already."""
        return nullcontext()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Gradients are whole on every worker: the plain norm."""
        return nn.utils.clip_grad_norm_(self._trainable, max_norm or float("inf"))
