"""AdamW as a pure function of the config. Its learning rates: `config.schedule`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatch

import torch
from torch import nn

from raysft.config.schema import Optim
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.parallel.strategy import State

# What wrappers put before the names of a model's parameters.
WRAPPERS = ("module.", "lm.", "base_model.model.")


def make_optimizer(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, as `optim` says."""
    groups = parameter_groups(module.named_parameters(), optim)
    settings: JsonObject = {
        "lr": optim.lr,
        "betas": (optim.betas[0], optim.betas[1]),
        "eps": optim.eps,
    }
    if optim.optimizer == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise UserError(
                "optim.optimizer: adamw8bit needs torchao: pip install 'raysft[quant]'"
            ) from None
        return AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], optim: Optim) -> list[State]:
    """The optimizer's groups: by `optim.groups`, and in each with decay (matrices) and without.

    `peak` of a group is its peak learning rate. Raises UserError for a pattern that matches no
    parameter that trains.
    """
    parameters = {plain_name(name): p for name, p in named if p.requires_grad}
    for number, asked in enumerate(optim.groups):
        for pattern in asked.match:
            if not any(fnmatch(name, pattern) for name in parameters):
                near = difflib.get_close_matches(pattern, parameters, 3, cutoff=0.3)
                raise UserError(
                    f"optim.groups[{number}].match: {pattern} matches no parameter that trains; "
                    f"names look like {', '.join(near or list(parameters)[:3])}"
                )
    found: dict[tuple[int, bool], State] = {}
    for name, parameter in parameters.items():
        number = next(
            (i for i, g in enumerate(optim.groups) if any(fnmatch(name, m) for m in g.match)), -1
        )
        own = optim.groups[number] if number >= 0 else None
        # One number a unit is a vector, whatever its shape ([n, 1]: ia3, the ranks of adalora).
        decays = sum(size > 1 for size in parameter.shape) >= 2
        decay = optim.weight_decay if own is None or own.weight_decay is None else own.weight_decay
        peak = optim.lr if own is None or own.lr is None else own.lr
        group = found.setdefault(
            (number, decays),
            {"params": [], "weight_decay": decay if decays else 0.0, "lr": peak, "peak": peak},
        )
        group["params"].append(parameter)
    return list(found.values())


def plain_name(name: str) -> str:
    """A parameter's name in the model as transformers knows it."""
    for prefix in WRAPPERS:
        name = name.removeprefix(prefix)
    return name


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """The rate of the next `optimizer.step()`, as a share of each group's peak."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao's: a new number would be compiled in
            group["lr"].fill_(group["peak"] * share)
        else:
            group["lr"] = group["peak"] * share
