"""What the strategies of plain torch (ddp, fsdp) share: precision, the step, and their state."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from raysft.config.schema import Config
from raysft.json_types import JsonObject
from raysft.parallel.optim import make_optimizer, set_rate
from raysft.parallel.scale import LossScale
from raysft.parallel.strategy import State, Stepped, trainable
from raysft.parallel.world import World

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Native:
    """A module whose parameters torch's own optimizers can step."""

    module: nn.Module

    def __init__(self, config: Config, module: nn.Module, world: World) -> None:
        """module: wrapped already."""
        self.module = module
        self.world = world
        self.optimizer = make_optimizer(module, config.optim)
        self._clip = config.optim.clip
        self._half = HALF.get(config.train.precision)
        self._scale = LossScale(dynamic=config.train.precision == "fp16")
        self._adapters_only = config.peft.method != "none"
        self._trainable = trainable(module)
        # torchao compiles its step. A CPU gains little by that, and may have no compiler.
        self._eager = config.optim.optimizer == "adamw8bit" and world.device.type == "cpu"

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in half precision over the weights as they are; fp32: nothing."""
        if self._half is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self._half)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of the loss, scaled where half-precision gradients would vanish."""
        (loss * self._scale.value if self._scale.value != 1.0 else loss).backward()

    def step(self, rate: float, before_zero: Callable[[], None] = lambda: None) -> Stepped:
        """See `Strategy.step`. The norm is the same on every worker, and so is what it decides."""
        self.reduce()
        gradients = [p.grad for p in self._trainable if p.grad is not None]
        norm = self.norm(gradients) / self._scale.value
        finite = math.isfinite(norm)
        if finite:
            factor = min(1.0, self._clip / (norm + 1e-6)) if self._clip else 1.0
            factor /= self._scale.value
            if factor != 1.0:
                _multiply(gradients, factor)
            set_rate(self.optimizer, rate)
            with self._uncompiled():
                self.optimizer.step()
            before_zero()
        self.optimizer.zero_grad(set_to_none=True)
        self._scale.update(finite)
        return Stepped(norm, skipped=not finite)

    def drop(self) -> None:
        """See `Strategy.drop`."""
        self.optimizer.zero_grad(set_to_none=True)

    def norm(self, gradients: list[torch.Tensor]) -> float:
        """Of the whole gradient. gradients: what this worker has of it; a collective."""
        return math.sqrt(squares(gradients))

    def reduce(self) -> None:
        """Average what the wrapper has not averaged in the last turn."""

    def state(self) -> State:
        """See `Strategy.state`; sharded tensors stay sharded."""
        return self._state()

    def facts(self) -> JsonObject:
        """The loss scale."""
        return {"loss_scale": self._scale.state()}

    def load(self, read: Callable[[State], None], weights_only: bool = False) -> None:
        """See `Strategy.load`."""
        state = {"model": self._weights()} if weights_only else self._state()
        read(state)
        options = StateDictOptions(strict=not self._adapters_only)
        set_model_state_dict(self.module, state["model"], options=options)
        if not weights_only:
            found = {**self._moments(), "state": state["optim"]}
            set_optimizer_state_dict(self.module, self.optimizer, found)

    def load_facts(self, facts: JsonObject) -> None:
        """See `Strategy.load_facts`."""
        self._scale.load(facts["loss_scale"])

    def _state(self) -> State:
        return {"model": self._weights(), "optim": self._moments()["state"]}

    def _moments(self) -> State:
        unmoved = not self.optimizer.state
        with self._uncompiled():
            found = get_optimizer_state_dict(self.module, self.optimizer)
        if unmoved:  # torch has made state by a step of rate zero, which AdamW has counted
            for state in self.optimizer.state.values():
                state["step"].zero_()
        return found

    def _uncompiled(self) -> AbstractContextManager[object]:
        return torch.compiler.set_stance("force_eager") if self._eager else nullcontext()

    def _weights(self) -> State:
        if not self._adapters_only:
            return get_model_state_dict(self.module)
        options = StateDictOptions(ignore_frozen_params=True)
        found = get_model_state_dict(self.module, options=options)
        # What is left of frozen weights: their second names, and buffers.
        names = [plain(name) for name, p in self.module.named_parameters() if p.requires_grad]
        return {name: found[name] for name in names}


def squares(gradients: list[torch.Tensor]) -> float:
    """The sum of squares over all shards of gradients; plain ones are whole on every worker, and
    sharded ones are on one mesh."""
    found = 0.0
    for sharded in (True, False):
        of_kind = [g for g in gradients if isinstance(g, DTensor) is sharded]
        if of_kind:
            norm = nn.utils.get_total_norm(of_kind)
            total = norm.full_tensor() if isinstance(norm, DTensor) else norm
            found += total.double().item() ** 2
    return found


def plain(name: str) -> str:
    """A parameter's name in the module that was wrapped."""
    return name.removeprefix("module.")


def _multiply(gradients: list[torch.Tensor], factor: float) -> None:
    for sharded in (True, False):
        of_kind = [g for g in gradients if isinstance(g, DTensor) is sharded]
        if of_kind:
            torch._foreach_mul_(of_kind, factor)
