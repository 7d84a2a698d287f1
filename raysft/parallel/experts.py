"""The experts of a mixture, shared: which a worker has, and how tokens come to them.

Workers 0 .. ep_size - 1 hold all experts between them, each a run of neighbours, and so do the next
ep_size workers: an expert group each. Workers that hold the same experts shard those among
themselves (FSDP2). A tensor whose first dimension is the experts is therefore cut twice along it:
by expert group first, then by copies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers.distributed.expert_parallel import AllToAllEP

from raysft.errors import UserError
from raysft.parallel.unread import Unread, is_stand_in
from raysft.parallel.world import World

NUMBER = "num_experts"  # of a module of fused experts, in every model of transformers


class ExpertGroups:
    """Who holds which experts. A collective: every worker makes one."""

    def __init__(self, size: int, world: World) -> None:
        """size: workers that hold all experts between them; divides the workers."""
        ranks = torch.arange(world.size).view(world.size // size, size, 1)
        kind = world.device.type
        names = ("copies", "experts", "batch")
        self.size = size
        # The last, of one worker each, is what transformers' exchange wants of tensor parallelism.
        self.mesh = DeviceMesh(kind, ranks, mesh_dim_names=names)
        # By experts first: the order in which a tensor is cut.
        self._cut = DeviceMesh(
            kind, ranks[..., 0].T.contiguous(), mesh_dim_names=("experts", "copies")
        )

    @property
    def copies(self) -> int:
        """How many workers hold the same experts."""
        return self.mesh.size(0)

    def share(self, experts: nn.Module, unseen: Unread | None) -> None:
        """Keep this worker's experts of a module of fused experts, and let tokens come to them.

        unseen: of the model, where its matrices are not read yet.
        """
        number = number_of(experts)
        own = number // self.size
        first = self.mesh.get_local_rank("experts") * own
        for holder, name, parameter in _of_experts(experts, number):
            if unseen is not None and is_stand_in(parameter):
                setattr(holder, name, unseen.part(parameter, first, own))
                continue
            kept = parameter.detach()[first : first + own].clone()
            setattr(holder, name, nn.Parameter(kept, parameter.requires_grad))
        setattr(experts, NUMBER, own)
        exchange = AllToAllEP(experts, self.mesh["experts"], self.mesh["batch"])

        def forward(
            hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            out: torch.Tensor = exchange(hidden_states, top_k_index, top_k_weights)
            return out.to(hidden_states.dtype)

        experts.forward = forward  # of this module, before that of its class

    def whole(self, part: DTensor) -> DTensor:
        """A tensor of all experts, of what FSDP has sharded of this worker's. Shares its memory."""
        shape = torch.Size((part.shape[0] * self.size, *part.shape[1:]))
        return DTensor.from_local(
            part.to_local(),
            self._cut,
            [Shard(0), Shard(0)],
            run_check=False,
            shape=shape,
            stride=part.stride(),
        )

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the workers that hold all experts between them, in place."""
        dist.all_reduce(value, group=self.mesh.get_group("experts"))
        return value


def number_of(experts: nn.Module) -> int:
    """How many experts a module of fused experts has."""
    return int(getattr(experts, NUMBER))


def _of_experts(experts: nn.Module, number: int) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """What a module of fused experts has for each of them: holder, name, parameter [E, ...]."""
    found = [
        (holder, name, parameter)
        for holder in experts.modules()
        for name, parameter in holder.named_parameters(recurse=False)
    ]
    for holder, name, parameter in found:
        if parameter.shape[0] != number:
            raise UserError(
                f"parallel.strategy: ep cannot share {type(holder).__name__}.{name} "
                f"{list(parameter.shape)}, whose first dimension is not the {number} experts"
            )
        yield holder, name, parameter
