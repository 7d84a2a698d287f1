"""Parameters that no batch of this run reaches: a vision tower that is trained on text.

They have no gradient, which other workers would wait for, and no optimizer state, which a resume
would look for. So they are frozen at the start, by name. Found in the graph of one forward pass of
two tokens (and a silent clip); no backward pass is run.

Experts that are modules each are reached by some batches only, and on some workers only: `touch`
gives all of them a gradient in each (DeepSpeed's zero1 and zero2 add up wrong ones without).
"""

from __future__ import annotations

import re

import torch
from torch import nn

from raysft.models.layout import Batch
from raysft.parallel.blocks import mixtures_of

# Experts that are modules of their own: those that no token was sent to are reached by others.
EXPERT = re.compile(r"\bexperts\.\d+\.")


def freeze(model: nn.Module, inputs: Batch) -> list[str]:
    """Stop training what `model(**inputs)` does not reach; returns the names."""
    found = unreached(model, inputs)
    named = dict(model.named_parameters())
    for name in found:
        named[name].requires_grad_(False)
    return found


def unreached(model: nn.Module, inputs: Batch) -> list[str]:
    """Names of parameters of `model` that train, and on which `model(**inputs)` does not depend."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        logits = model(**inputs, use_cache=False).logits
    reached = _leaves(logits)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = {EXPERT.sub("experts.*.", name) for name, p in named.items() if id(p) in reached}
    return [
        name
        for name, p in named.items()
        if id(p) not in reached and EXPERT.sub("experts.*.", name) not in groups
    ]


def touch(net: nn.Module) -> None:
    """Let each pass through a mixture reach all of its experts that train, with a weight of zero.
    Fused experts are reached together."""
    for mixture in mixtures_of(net):
        mixture.register_forward_hook(_touched)


def _touched(mixture: nn.Module, args: object, output: object) -> object:
    trained = [p for p in mixture.parameters() if p.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return output
    nothing = torch.stack([p.flatten()[0].float() * 0.0 for p in trained]).sum()
    if isinstance(output, tuple):
        return (output[0] + nothing.to(output[0].dtype), *output[1:])
    assert isinstance(output, torch.Tensor)
    return output + nothing.to(output.dtype)


def summary(names: list[str]) -> str:
    """`names` in a line, by the module they share."""
    counts: dict[str, int] = {}
    for name in names:
        short = re.sub(r"\.\d+\..*", ".*", name)
        short = ".".join(short.split(".")[:4])
        counts[short] = counts.get(short, 0) + 1
    shown = [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
    rest = f", and {len(shown) - 5} more" if len(shown) > 5 else ""
    return ", ".join(shown[:5]) + rest


def _leaves(output: torch.Tensor) -> set[int]:
    """Ids of the tensors in whose gradient the graph of `output` ends."""
    found: set[int] = set()
    seen: set[int] = set()
    nodes = [output.grad_fn]
    kept = []  # a node that is freed could lend its id to another
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        kept.append(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        nodes += [following for following, _ in node.next_functions]
    return found
