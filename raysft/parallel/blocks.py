"""The parts of a model that are sharded, and compiled, one by one."""

from __future__ import annotations

from torch import nn


def blocks(module: nn.Module) -> list[nn.Module]:
    """Modules of the classes that transformers models list as not to be split, innermost first."""
    names: set[str] = set()
    for part in module.modules():
        names |= set(getattr(part, "_no_split_modules", None) or ())
    found = [part for part in module.modules() if type(part).__name__ in names]
    return found[::-1]
