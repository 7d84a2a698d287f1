"""The parts of a model that are sharded, and compiled, one by one."""

from __future__ import annotations

from torch import nn


def blocks(module: nn.Module) -> list[nn.Module]:
    """Modules of the classes that transformers models list as not to be split, innermost first.

    A part that is called another number of times on each worker (`whole_parts`) is one of them, and
    nothing in it is: its parameters are brought together once a pass.
    """
    names: set[str] = set()
    for part in module.modules():
        names |= set(getattr(part, "_no_split_modules", None) or ())
    whole = whole_parts(module)
    within = {id(part) for one in whole for part in one.modules()}
    found = [part for part in module.modules() if type(part).__name__ in names]
    return [*whole, *(part for part in found[::-1] if id(part) not in within)]


def whole_parts(module: nn.Module) -> list[nn.Module]:
    """Parts that say of themselves that they are not to be sharded in pieces, by the name that
    DeepSpeed looks for."""
    return [part for part in module.modules() if getattr(part, "_z3_leaf", False)]
