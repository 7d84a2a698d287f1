"""fsdp: FSDP2. Parameters, gradients and optimizer state are sharded layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from raysft.errors import UserError
from raysft.parallel.strategy import trainable
from raysft.parallel.world import World


class Fsdp:
    """A shard group for every block the model calls indivisible; the rest is the root's."""

    def __init__(self, module: nn.Module, world: World) -> None:
        if not dist.is_initialized():
            raise UserError("parallel.strategy: fsdp needs a process group; use ddp in one process")
        module = module.to(world.device)
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in _blocks(module):
            fully_shard(block, mesh=mesh)
        self.module: FSDPModule = fully_shard(module, mesh=mesh)  # type: ignore[assignment]
        self._trainable = trainable(self.module)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Gradients are reduced in the last turn only: a whole gradient is held until then."""
        self.module.set_requires_gradient_sync(last)
        yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The root's own parameters (embeddings, head) unsharded; blocks gather as they run."""
        self.module.unshard()
        try:
            yield
        finally:
            self.module.reshard()

    def clip(self, max_norm: float) -> torch.Tensor:
        """The norm over all shards."""
        norm = nn.utils.get_total_norm([p.grad for p in self._trainable if p.grad is not None])
        total = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if max_norm:
            nn.utils.clip_grads_with_norm_(self._trainable, max_norm, total)
        return total


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Modules of the classes that transformers models list as not to be split, innermost first."""
    names: set[str] = set()
    for part in module.modules():
        names |= set(getattr(part, "_no_split_modules", None) or ())
    found = [part for part in module.modules() if type(part).__name__ in names]
    return found[::-1]
