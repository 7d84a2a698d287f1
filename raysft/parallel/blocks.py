"""The parts of a model that are sharded, and compiled, one by one; and those that are experts."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def blocks(module: nn.Module) -> list[nn.Module]:
    """Modules of the classes that transformers models list as not to be split, innermost first:
    layers, without what they list inside of one, and stacks of layers after these."""
    names: set[str] = set()
    for part in module.modules():
        names |= set(getattr(part, "_no_split_modules", None) or ())
    found = [part for part in module.modules() if type(part).__name__ in names]
    listed, inside = set(found), set()
    for outer in found:
        nested = {path: part for path, part in outer.named_modules() if path and part in listed}
        # What a list in it holds are layers of their own.
        if not any(name.isdigit() for path in nested for name in path.split(".")):
            inside |= set(nested.values())
    return [part for part in found if part not in inside][::-1]


def tables_of(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Of the transformers model in `module`, as peft may have wrapped them: the input embedding,
    and the head. Both are in the second list where they share a weight; what is part of a block, or
    is not there, is in neither."""
    nets = (part for part in module.modules() if isinstance(part, PreTrainedModel))
    if (net := next(nets, None)) is None:
        return [], []
    within = {part for block in blocks(module) for part in block.modules()}
    first, last = (
        [table] if table is not None and table not in within else []
        for table in (net.get_input_embeddings(), net.get_output_embeddings())
    )
    if first and last and set(first[0].parameters()) & set(last[0].parameters()):
        return [], list(dict.fromkeys([*first, *last]))
    return first, last


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


def reach_experts(net: nn.Module) -> None:
    """Let each pass through a mixture of `mixtures_of` reach all of its experts that train, those
    that no token has chosen with a gradient of zero.

    Workers' tokens choose other experts, and gradients are added up in the order in which they are
    there: the same on every worker, because here all of a mixture's are complete only when its
    backward pass is through (what is first in the forward pass is last in that). DeepSpeed's zero1
    and zero2 add up gradients of different parameters without, and ddp and fsdp raise or wait.
    """
    for mixture in mixtures_of(net):
        mixture.register_forward_pre_hook(_reached)


def _reached(mixture: nn.Module, args: tuple[object, ...]) -> tuple[object, ...] | None:
    trained = [p for p in mixture.parameters() if p.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return None
    hidden, *rest = args
    if not isinstance(hidden, torch.Tensor):
        raise ValueError(f"{type(mixture).__name__}: its first argument is no tensor")
    nothing = torch.stack([p.flatten()[0].float() * 0.0 for p in trained]).sum()
    return (hidden + nothing.to(hidden.dtype), *rest)
