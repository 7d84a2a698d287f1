"""Which class implements a strategy; loaded when a config asks for it, and no other."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from raysft.config import strategies
from raysft.config.schema import Config
from raysft.config.strategies import StrategyTraits, traits_of
from raysft.errors import UserError
from raysft.parallel.strategy import Strategy
from raysft.parallel.world import World

# By the name of a row of `config.strategies`: "module:Class", made of (config, module, world).
CLASSES: dict[str, str] = {
    "ddp": "raysft.parallel.ddp:Ddp",
    "fsdp": "raysft.parallel.fsdp:Fsdp",
    "zero1": "raysft.parallel.zero:Zero",
    "zero2": "raysft.parallel.zero:Zero",
    "zero3": "raysft.parallel.zero:Zero",
}


def register(traits: StrategyTraits, implementation: str) -> None:
    """Put in a strategy from outside, in every process that reads the config or trains.

    implementation: "module:Class", see `CLASSES`. Raises UserError where the name is taken.
    """
    strategies.add(traits)
    CLASSES[traits.name] = implementation


def make_strategy(config: Config, module: nn.Module, world: World) -> Strategy:
    """Wrap `module` (on CPU, the same weights on every worker) as `parallel.strategy` says.

    module: what frozen parameters it has are known; their state is not saved where `peft.method`
    is set. Raises UserError where there is no such strategy, or where it cannot work here.
    """
    traits, device = traits_of(config.parallel.strategy), world.device
    half = config.train.precision == "bf16" and device.type == "cuda"
    if half and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"train.precision: bf16, but {torch.cuda.get_device_name(device)} has none; "
            "use fp16 or fp32"
        )
    return load_class(traits)(config, module, world)


def load_class(traits: StrategyTraits) -> type[Strategy]:
    """The class of a strategy. Raises UserError where it has none yet."""
    if traits.name not in CLASSES:
        raise UserError(f"parallel.strategy: {traits.name} is not available yet")
    place, _, name = CLASSES[traits.name].partition(":")
    return getattr(importlib.import_module(place), name)
