"""Which class implements a strategy; loaded when a config asks for it, and no other."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable

import torch
from torch import nn

from raysft.config.schema import Config
from raysft.config.strategies import StrategyTraits, traits_of
from raysft.errors import UserError
from raysft.parallel.blocks import reach_experts
from raysft.parallel.precision import has_bf16, settled
from raysft.parallel.strategy import Strategy
from raysft.parallel.world import World


def make_strategy(config: Config, module: nn.Module, world: World) -> Strategy:
    """Wrap `module` (on CPU, the same weights on every worker) as `parallel.strategy` says.

    module: what frozen parameters it has are known; their state is not saved where `peft.method`
    is set. Raises UserError where there is no such strategy, or where it cannot work here.
    """
    traits, device = traits_of(config.parallel.strategy), world.device
    config = settled(config, device)
    half = config.train.precision == "bf16" and device.type == "cuda"
    if half and not has_bf16(device):
        raise UserError(
            f"train.precision: bf16, but {torch.cuda.get_device_name(device)} has none; "
            "use fp16 or fp32"
        )
    if traits.stage != 3:  # which gathers and reduces all experts of a mixture at once
        reach_experts(module)
    return load_class(traits)(config, module, world)


def load_class(traits: StrategyTraits) -> Callable[[Config, nn.Module, World], Strategy]:
    """The class of a strategy. Raises UserError where it has none."""
    if traits.implementation is None:
        raise UserError(f"parallel.strategy: {traits.name} was registered without a class")
    return pkgutil.resolve_name(traits.implementation)
