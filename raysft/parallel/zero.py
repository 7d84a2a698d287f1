"""zero1, zero2, zero3: DeepSpeed's ZeRO. Optimizer state is sharded over the workers; from zero2 on
gradients too; under zero3 parameters as well, gathered module by module as they are used.

Checkpoints are those of the other strategies: whole tensors by the model's own names, each written
by one worker. A run goes on under any strategy, with any number of workers.

In half precision the weights are in half precision, with float32 master weights in the shards;
gradients are summed and added up in float32. zero3 shards what comes from `model.path` while it is
read (`zero_fill`); all else is whole on every worker's host first.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raysft.config.deepspeed import unused
from raysft.config.schema import Config
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.parallel import unread, zero_fill
from raysft.parallel.blocks import mixtures_of
from raysft.parallel.deepspeed_json import make_settings
from raysft.parallel.native import HALF
from raysft.parallel.optim import make_optimizer, set_rate
from raysft.parallel.scale import LossScale
from raysft.parallel.strategy import State, Stepped
from raysft.parallel.world import World
from raysft.parallel.zero_state import ZeroState, entries

log = logging.getLogger(__name__)


class Zero:
    """A DeepSpeed engine around the model and torch's AdamW."""

    module: nn.Module

    def __init__(self, config: Config, module: nn.Module, world: World) -> None:
        strategy = config.parallel.strategy
        if not dist.is_initialized():
            raise UserError(
                f"parallel.strategy: {strategy} needs a process group; use ddp in one process"
            )
        settings = make_settings(config, pin_memory=world.device.type == "cuda")
        for line in unused(config) if world.is_main else ():
            log.warning("%s", line)
        saved = entries(module, config.peft.method != "none", world.size)
        self._adamw = make_optimizer(module, config.optim)
        deepspeed = _deepspeed(world.device)
        # zero3 gathers what a module computes with where it is called, which all workers have to:
        # for a mixture all of its experts at once, whichever are called.
        for mixture in mixtures_of(module):
            deepspeed.utils.set_z3_leaf_module(mixture, True)
        _refuse_precision(config, deepspeed.get_accelerator())
        if (unseen := unread.of(module)) is not None:
            dtype = HALF.get(config.train.precision, torch.float32)
            zero_fill.fill(module, unseen, deepspeed, settings, dtype, world)
        with redirect_stdout(io.StringIO()):  # zero1 in bf16 prints its memory
            engine, optimizer, _, _ = deepspeed.initialize(
                args=SimpleNamespace(device_rank=world.device.index or 0),
                model=module,
                optimizer=self._adamw,
                config=settings,
                dist_init_required=False,
            )
        self.module, self._engine, self._zero = engine, engine, optimizer
        self._state = ZeroState(engine, self._adamw, saved, world)
        # Scaled by the rule that all strategies share. DeepSpeed's own would, in a step in which it
        # doubles the scale, divide by the new one what was multiplied by the old one.
        self._scale = LossScale(dynamic=config.train.precision == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        """Nothing: the weights are in half precision themselves."""
        return nullcontext()

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """zero1 reduces gradients in the last turn; zero2 and zero3 in each, for they keep only
        their shards."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of the loss, which is normalised already."""
        if self._scale.dynamic:
            self._zero.loss_scale = self._scale.value
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, rate: float, before_zero: Callable[[], None] = lambda: None) -> Stepped:
        """See `Strategy.step`. DeepSpeed keeps no whole gradients for `before_zero` to find."""
        set_rate(self._adamw, rate)
        self._engine.step()
        skipped = bool(self._zero.overflow)
        self._scale.update(not skipped)
        if not skipped:
            before_zero()
        norm = self._engine.get_global_grad_norm()
        return Stepped(math.inf if skipped else float(norm), skipped)

    def drop(self) -> None:
        """See `Strategy.drop`. DeepSpeed forgets all of a gradient only when its norm is infinite,
        so that is what it is told."""
        if hasattr(self._zero, "clear_hp_grads"):  # but for zero1 in bf16
            self._zero.zero_grad()
            return
        of_all = hasattr(self._zero, "scaled_global_norm")  # zero3 asks for those of its groups
        name = "scaled_global_norm" if of_all else "_get_norm_groups"
        infinite = torch.tensor(math.inf if of_all else [math.inf])
        setattr(self._zero, name, lambda: infinite)
        try:
            self._engine.step()
        finally:
            delattr(self._zero, name)
        assert self._zero.overflow, "the dropped gradient has moved weights"

    def whole(self) -> AbstractContextManager[object]:
        """Modules gather their parameters as they run."""
        return nullcontext()

    def state(self) -> State:
        """See `Strategy.state`: whole tensors on the CPU, each from one worker."""
        return self._state.gather()

    def facts(self) -> JsonObject:
        """The loss scale."""
        return {"loss_scale": self._scale.state()}

    def load(self, read: Callable[[State], None], weights_only: bool = False) -> None:
        """See `Strategy.load`; reads in parts."""
        self._state.scatter(read, weights_only)

    def load_facts(self, facts: JsonObject) -> None:
        """See `Strategy.load_facts`."""
        self._scale.load(facts["loss_scale"])


def _deepspeed(device: torch.device) -> ModuleType:
    """The library, told which device to use before it looks for one, and kept quiet."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    found = deepspeed.get_accelerator().device_name()
    if found != device.type:
        raise UserError(
            f"parallel.device: workers use {device.type}, but DeepSpeed was set up for {found} in "
            f"this process already; set DS_ACCELERATOR={device.type} in its environment"
        )
    # It would compile a shared-memory all-reduce for CPUs of one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _refuse_precision(config: Config, accelerator: Any) -> None:
    precision, strategy = config.train.precision, config.parallel.strategy
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if precision in supported and not supported[precision]():
        raise UserError(
            f"train.precision: {strategy} keeps weights in {precision}, which DeepSpeed does not "
            f"support on this {accelerator.device_name()}; use fp32, or fsdp"
        )
