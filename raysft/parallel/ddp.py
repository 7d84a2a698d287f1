"""ddp: a whole model on every worker; gradients are averaged in the last turn of a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raysft.config.schema import Config
from raysft.parallel.native import Native
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
        super().__init__(config, module, world)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Turns before the last one keep their gradients to themselves."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    def whole(self) -> AbstractContextManager[Any]:
        """Parameters are whole already."""
        return nullcontext()
