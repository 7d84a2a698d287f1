"""ep: expert parallelism. Workers share the experts of a mixture, and exchange tokens for them.

All else is sharded by FSDP2 over all workers, as in `fsdp`. Of an expert a worker has all or
nothing while it computes, so that a step moves tokens instead of weights: each (token, expert) goes
to the worker that has the expert, and its output comes back. Each expert's gradient is then that of
all tokens that its group sent; summed over the groups and divided by the number of workers it is
the mean over workers, as every other gradient.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from raysft.config.schema import Config, Parallel
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.parallel import unread
from raysft.parallel.blocks import experts_of
from raysft.parallel.experts import ExpertGroups, number_of
from raysft.parallel.fsdp import Fsdp
from raysft.parallel.native import squares
from raysft.parallel.strategy import State
from raysft.parallel.world import World


class Ep(Fsdp):
    """FSDP2 for what all tokens pass; experts in groups of `parallel.ep_size` workers."""

    exchanges = True
    _groups: ExpertGroups
    _experts: frozenset[str]  # names of what is theirs, in the wrapped module

    def keep_experts(self, config: Config, module: nn.Module, world: World) -> None:
        """Give each worker its experts."""
        size = ep_size(config.parallel.ep_size, world.size, _numbers(module))
        self._groups = ExpertGroups(size, world)
        unseen = unread.of(module)
        for _, experts in experts_of(module):
            self._groups.share(experts, unseen)

    def shard_experts(self, module: nn.Module, world: World, settings: JsonObject) -> None:
        """Shard each worker's experts among the workers that have the same ones."""
        names = set()
        for name, experts in experts_of(module):
            names |= {f"{name}.{own}" for own, _ in experts.named_parameters()}
            sharded: FSDPModule = fully_shard(
                experts, **{**settings, "mesh": self._groups.mesh["copies"]}
            )
            sharded.set_gradient_divide_factor(float(world.size))
            if self._groups.copies > 1:
                # As a sum, divided here: gloo has no sum that divides, and NCCL's in bf16 is wrong.
                sharded.set_force_sum_reduction_for_comms(True)
        self._experts = frozenset(names)

    def norm(self, gradients: list[torch.Tensor]) -> float:
        """See `Native.norm`: that of the experts is summed over their group."""
        named = cast(nn.Module, self.module).named_parameters()
        theirs = {id(p.grad) for name, p in named if name in self._experts}
        ours = [g for g in gradients if id(g) in theirs]
        found = torch.tensor(squares(ours), dtype=torch.float64, device=self.world.device)
        total = float(self._groups.sum(found))
        return math.sqrt(total + squares([g for g in gradients if id(g) not in theirs]))

    def state(self) -> State:
        """See `Strategy.state`; what all experts have is one tensor, cut along the experts."""
        return self._of_all_in(super().state())

    def load(self, read: Callable[[State], None], weights_only: bool = False) -> None:
        """See `Strategy.load`."""
        super().load(lambda state: read(self._of_all_in(state)), weights_only)

    def of_all(self, name: str, part: object) -> object:
        """What belongs to a parameter, of all experts where it is theirs: in the same memory.

        part: a tensor of the parameter's shape, or a dictionary of such and of others.
        """
        if isinstance(part, dict):
            return {key: self.of_all(name, value) for key, value in part.items()}
        if name in self._experts and isinstance(part, DTensor):
            return self._groups.whole(part)
        return part

    def _of_all_in(self, state: State) -> State:
        return {
            section: {name: self.of_all(name, part) for name, part in parts.items()}
            for section, parts in state.items()
        }


def check(parallel: Parallel, net: nn.Module) -> None:
    """Raises UserError where the experts of `net` cannot be shared as `parallel` says."""
    ep_size(parallel.ep_size, parallel.max_workers, _numbers(net))


def _numbers(net: nn.Module) -> list[int]:
    """How many experts the layers of `net` have, without repetition."""
    found = sorted({number_of(experts) for _, experts in experts_of(net)})
    if not found:
        raise UserError(
            f"parallel.strategy: ep shares the experts of a mixture among workers, but "
            f"{type(net).__name__} has none (of those that transformers keeps as one matrix a "
            "layer); use fsdp or zero3"
        )
    return found


def ep_size(asked: int | None, workers: int, experts: list[int]) -> int:
    """How many workers hold all experts between them. experts: of each layer, without repetition.

    asked: `parallel.ep_size`; None: the most of a node's workers that divide all of these. Raises
    UserError where it does not divide, naming what would.
    """
    every = math.gcd(workers, *experts)
    fits = [size for size in range(1, every + 1) if every % size == 0]
    if asked is None:
        node = int(os.environ.get("LOCAL_WORLD_SIZE", workers))
        return max(size for size in fits if node % size == 0)
    if asked not in fits:
        raise UserError(
            f"parallel.ep_size: {asked} workers cannot hold {_listed(experts)} experts between "
            f"them, of {workers} workers in all: it has to divide both; "
            f"{_listed(fits)} would"
        )
    return asked


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if numbers[1:] else "") + str(numbers[-1])
