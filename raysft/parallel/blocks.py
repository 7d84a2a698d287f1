"""The parts of a model that are sharded, and compiled, one by one; and those that are experts."""

from __future__ import annotations

from torch import nn


def blocks(module: nn.Module) -> list[nn.Module]:
    """Modules of the classes that transformers models list as not to be split, innermost first."""
    names: set[str] = set()
    for part in module.modules():
        names |= set(getattr(part, "_no_split_modules", None) or ())
    found = [part for part in module.modules() if type(part).__name__ in names]
    return found[::-1]


def experts_of(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each layer's experts in `net`, in its order: modules whose matrices are
    parameters [E, ...] of three dimensions, the experts in the first. [] of a dense model, and of
    one whose experts are modules each."""
    return [
        (name, module)
        for name, module in net.named_modules()
        if hasattr(module, "_is_expert_parallel") and hasattr(module, "num_experts")
    ]


def mixtures_of(net: nn.Module) -> list[nn.Module]:
    """Modules of `net` whose experts are modules each, called where a token has chosen them."""
    return [
        part
        for part in net.modules()
        if any(
            isinstance(child, (nn.ModuleList, nn.ModuleDict)) and name.endswith("experts")
            for name, child in part.named_children()
        )
    ]
