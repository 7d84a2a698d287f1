"""fsdp: FSDP2. Parameters, gradients and optimizer state are sharded layer by layer, embedding and
head each by themselves.

With `parallel.replicate` there are several copies of the model, each sharded over its own workers
(HSDP), those of a node together. In half precision the shards travel in half precision; gradients
are summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)

from raysft.config.schema import Config
from raysft.config.strategies import gradients_of
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.parallel import unread
from raysft.parallel.blocks import blocks, tables_of
from raysft.parallel.fill import fill
from raysft.parallel.native import HALF, Native
from raysft.parallel.unsharded import begin, fits, keep, unsharded
from raysft.parallel.world import World


class Fsdp(Native):
    """A shard group for every block the model calls indivisible, for the embedding and for the head
    (one for both where they share a weight); the rest is the root's."""

    exchanges = False  # whether a forward pass of whole weights is a collective all the same
    module: FSDPModule  # type: ignore[assignment]  # fully_shard makes of a module both

    def __init__(self, config: Config, module: nn.Module, world: World) -> None:
        if not dist.is_initialized():
            raise UserError("parallel.strategy: fsdp needs a process group; use ddp in one process")
        offload = config.parallel.offload == "parameters"
        settings: JsonObject = {"mesh": _mesh(config.parallel.replicate, world)}
        if (half := HALF.get(config.train.precision)) is not None:
            settings["mp_policy"] = MixedPrecisionPolicy(half, torch.float32)
        if offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        # AdaLoRA ranks whole matrices by their gradients: its adapters stay whole.
        self._whole = _adapters(module) if config.peft.method == "adalora" else []
        if self._whole:
            settings["ignored_params"] = set(self._whole)
            for adapter in self._whole:
                adapter.data = adapter.data.to(world.device)
        self.keep_experts(config, module, world)
        unseen = unread.of(module)
        places = unseen.places(module) if unseen is not None else {}
        unread.to_meta(module)
        self.shard_experts(module, world, settings)
        # Block by block to the device, where each is cut up before the next one comes.
        for block in blocks(module):
            fully_shard(block, **settings)
        # The backward pass begins with the head: freed in between, it would travel twice.
        self._tables: list[nn.Module] = []
        for tables, kept in zip(tables_of(module), (False, True), strict=True):
            if tables:
                fully_shard(tables, reshard_after_forward=not kept, **settings)
                self._tables += tables
                keep(tables, kept)
        sharded = cast(nn.Module, fully_shard(module, **settings))
        keep([sharded], True)
        if unseen is not None:
            fill(sharded, unseen, places, torch.device("cpu") if offload else world.device)
        super().__init__(config, sharded, world)
        trained = sum(parameter.numel() for parameter in self._trainable)
        self.gradients = gradients_of(config.parallel.gradients, trained)

    def keep_experts(self, config: Config, module: nn.Module, world: World) -> None:
        """Leave this worker what it is to hold of `module`, before anything is sharded."""

    def shard_experts(self, module: nn.Module, world: World, settings: JsonObject) -> None:
        """Shard what is not sharded over all workers, before the blocks are. settings: of
        `fully_shard`."""

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Gradients are reduced in the last turn, and held whole until then, or in each."""
        self.module.set_requires_gradient_sync(last or self.gradients == "sharded")
        yield

    def reduce(self) -> None:
        """Adapters that are whole on every worker are averaged here, all in one message."""
        gradients = [p.grad for p in self._whole if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        self.world.sum_tensor(flat).div_(self.world.size)
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    @contextmanager
    def whole(self) -> Iterator[bool]:
        """All parameters unsharded where every worker has room for them, else embedding, head and
        what is in no block: blocks then gather as they run."""
        begin(self.module)
        if self.exchanges or not fits(self.module, self._half, self.world):
            with unsharded([*self._tables, cast(nn.Module, self.module)]):
                yield False
            return
        with unsharded(cast(nn.Module, self.module).modules()):
            yield True


def _mesh(replicate: int | Literal["auto"], world: World) -> DeviceMesh:
    """Of one dimension, or of copies and their shards. auto: who knows what the model takes makes
    it a number (`train.replicas`); where nobody did, there is one copy."""
    replicate = 1 if replicate == "auto" else replicate
    if world.size % replicate:
        raise UserError(
            f"parallel.replicate: {world.size} workers cannot hold {replicate} copies of the model "
            "with as many workers each"
        )
    kind = world.device.type
    if replicate == 1:
        return init_device_mesh(kind, (world.size,))
    nodes = world.nodes()
    ranks = sorted(range(world.size), key=lambda rank: (nodes.index(nodes[rank]), rank))
    shape = torch.tensor(ranks).view(replicate, world.size // replicate)
    return DeviceMesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def _adapters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
