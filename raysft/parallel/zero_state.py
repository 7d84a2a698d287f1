"""The state of a DeepSpeed engine as whole tensors by the model's own names, and back.

Tensor by tensor on the way out: a worker holds its share of the checkpoint in host memory and one
tensor more. In chunks of CHUNK_BYTES on the way in: every worker reads all of it, and keeps its
shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from raysft.errors import UserError
from raysft.parallel.strategy import State
from raysft.parallel.world import World

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

CHUNK_BYTES = 2**30
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, shaped as the parameter
# Where DeepSpeed's optimizers (zero1 and zero2; zero3; zero1 in bf16) keep their float32 shards.
_SHARDS = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
)


@dataclass
class Entry:
    """A parameter, or a buffer that is saved, under the names it has (tied weights have several).

    shape: of the whole. optim: the name of its optimizer state, None where it does not train.
    """

    tensor: torch.Tensor
    shape: torch.Size
    names: list[str] = field(default_factory=list)
    optim: str | None = None
    owner: int = 0  # the worker that writes it

    @property
    def bytes(self) -> int:
        """In a checkpoint."""
        return 4 * self.shape.numel() * (1 if self.optim is None else 1 + len(MOMENTS))


def entries(module: nn.Module, adapters_only: bool, workers: int) -> list[Entry]:
    """What a checkpoint holds of a plain module, not wrapped yet; each worker writes its share.

    adapters_only: frozen parameters are not saved.
    """
    options = StateDictOptions(ignore_frozen_params=adapters_only)
    saved = get_model_state_dict(module, options=options)
    named: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named |= dict(module.named_buffers(remove_duplicate=False))
    found: dict[int, Entry] = {}
    for name, tensor in named.items():
        if name in saved:
            entry = found.setdefault(id(tensor), Entry(tensor, tensor.shape))
            entry.names.append(name)
            if tensor.requires_grad and entry.optim is None:
                entry.optim = name
    load = [0] * workers
    for entry in found.values():
        entry.owner = load.index(min(load))
        load[entry.owner] += entry.bytes
    return list(found.values())


class ZeroState:
    """Gathers and scatters. Every method is a collective."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        adamw: torch.optim.Optimizer,
        entries: list[Entry],
        world: World,
    ) -> None:
        """engine: of DeepSpeed; its optimizer wraps `adamw`."""
        self._zero = engine.optimizer
        self._adamw, self._entries, self._world = adamw, entries, world
        self._shards = _shards(self._zero)
        # A buffer is another tensor once the module was moved.
        buffers = dict(engine.named_buffers(remove_duplicate=False))
        for entry in entries:
            entry.tensor = buffers.get(f"module.{entry.names[0]}", entry.tensor)
        # As AdamW would begin, but before its first step: a run that resumes has none before.
        for shard in self._shards:
            adamw.state[shard] = {
                "step": torch.zeros((), device=shard.device),
                **{key: torch.zeros_like(shard, requires_grad=False) for key in MOMENTS},
            }
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._lazy_init_hp_params_optimizer_state()

    def gather(self) -> State:
        """This worker's part of the state, on the CPU, in float32."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: State = {"model": {}, "optim": {}}
        step = self._adamw.state[self._shards[0]]["step"].detach().cpu()
        for entry in self._entries:
            mine = entry.owner == self._world.rank
            whole = self._whole(entry)
            if mine:
                state["model"].update(dict.fromkeys(entry.names, _copy(whole)))
            if entry.optim is None:
                continue
            found = {"step": step.clone()}
            for key in MOMENTS:
                whole = safe_get_full_optimizer_state(entry.tensor, key)
                if mine:
                    found[key] = _copy(whole)
            if mine:
                state["optim"][entry.optim] = found
        # A worker without a share says nothing: an empty section would be saved as one.
        return {section: part for section, part in state.items() if part}

    @torch.no_grad()
    def scatter(self, read: Callable[[State], None], weights_only: bool) -> None:
        """Take over what `read` fills in.

        Raises UserError where parameters have made different numbers of steps: a shard holds
        several, and counts once.
        """
        steps: set[float] = set()
        for chunk in self._chunks():
            state: State = {"model": {}, "optim": {}}
            for entry in chunk:
                whole = torch.empty(entry.shape, dtype=_saved_type(entry.tensor))
                state["model"].update(dict.fromkeys(entry.names, whole))
                if entry.optim is not None and not weights_only:
                    state["optim"][entry.optim] = {
                        "step": torch.zeros(()),
                        **{key: torch.empty(entry.shape) for key in MOMENTS},
                    }
            if not state["optim"]:
                del state["optim"]
            read(state)
            self._write_weights(chunk, state)
            for entry in chunk:
                found = state.get("optim", {}).get(entry.optim)
                if found is not None:
                    steps.add(float(found["step"]))
                    for key in MOMENTS:
                        self._write(entry.tensor, found[key], key)
        if len(steps) > 1:
            raise UserError(
                f"parallel.strategy: the parameters of this checkpoint have made {min(steps):.0f} "
                f"to {max(steps):.0f} steps, which ZeRO cannot keep apart; go on with ddp or fsdp"
            )
        for shard in self._shards if steps else []:
            self._adamw.state[shard]["step"].fill_(steps.copy().pop())

    def _chunks(self) -> Iterator[list[Entry]]:
        chunk: list[Entry] = []
        for entry in self._entries:
            if chunk and sum(e.bytes for e in chunk) + entry.bytes > CHUNK_BYTES:
                yield chunk
                chunk = []
            chunk.append(entry)
        if chunk:
            yield chunk

    def _whole(self, entry: Entry) -> torch.Tensor:
        """The value that is saved: the master weight where there is one."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        tensor = entry.tensor
        if entry.optim is not None:
            return safe_get_full_fp32_param(tensor)
        if not hasattr(tensor, "ds_id"):
            return tensor.detach()
        with GatheredParameters([tensor]):
            return tensor.detach().clone()

    def _write_weights(self, chunk: list[Entry], state: State) -> None:
        """Into the weights that the model computes with, and into the master weights."""
        from deepspeed.runtime.zero import GatheredParameters

        sharded = [entry.tensor for entry in chunk if hasattr(entry.tensor, "ds_id")]
        # On leaving, DeepSpeed spreads what rank 0 has written.
        with GatheredParameters(sharded, modifier_rank=0):
            for entry in chunk:
                if not hasattr(entry.tensor, "ds_id") or self._world.is_main:
                    entry.tensor.copy_(state["model"][entry.names[0]])
        for entry in chunk:
            if entry.optim is not None:
                self._write(entry.tensor, state["model"][entry.names[0]])

    def _write(self, parameter: Any, whole: torch.Tensor, key: str | None = None) -> None:
        """This worker's shard of a parameter's master weight, or of its optimizer state `key`."""
        from deepspeed import utils

        if hasattr(parameter, "ds_id"):
            size = parameter.ds_tensor.numel()
            begin = self._world.rank * size
            # The last shards are filled up with zeros.
            part = torch.zeros(size)
            real = whole.flatten()[begin : begin + size]
            part[: real.numel()] = real
            if key is None:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, key)


def _shards(optimizer: Any) -> list[torch.Tensor]:
    name = next(name for name in _SHARDS if hasattr(optimizer, name))
    return list(getattr(optimizer, name))


def _saved_type(tensor: torch.Tensor) -> torch.dtype:
    """Half-precision weights are saved in float32, as those of every strategy."""
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def _copy(whole: torch.Tensor) -> torch.Tensor:
    return whole.detach().to("cpu", _saved_type(whole), copy=True)
