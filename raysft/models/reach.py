"""Parameters that no batch of this run reaches: a vision tower that is trained on text.

They have no gradient, which other workers would wait for, and no optimizer state, which a resume
would look for. So they are frozen at the start, by name. Found in the graph of one forward pass of
two tokens (and a silent clip); no backward pass is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from raysft.models.layout import Batch

# Experts that are modules of their own: those that no token was sent to are reached by others.
EXPERT = re.compile(r"\bexperts\.\d+\.")


Made = Callable[[CausalLMOutputWithPast], Iterable[torch.Tensor]]
"""What losses are made of, of what a model returns."""


def _logits(output: CausalLMOutputWithPast) -> Iterable[torch.Tensor]:
    assert output.logits is not None
    return [output.logits]


def freeze(model: nn.Module, inputs: Batch, made: Made = _logits) -> list[str]:
    """Stop training what `model(**inputs)` does not reach; returns the names."""
    found = unreached(model, inputs, made)
    named = dict(model.named_parameters())
    for name in found:
        named[name].requires_grad_(False)
    return found


def unreached(model: nn.Module, inputs: Batch, made: Made = _logits) -> list[str]:
    """Names of parameters of `model` that train, and on which what is `made` of `model(**inputs)`
    does not depend."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        outputs = made(model(**inputs, use_cache=False))
    reached = set().union(*map(_leaves, outputs))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = {EXPERT.sub("experts.*.", name) for name, p in named.items() if id(p) in reached}
    return [
        name
        for name, p in named.items()
        if id(p) not in reached and EXPERT.sub("experts.*.", name) not in groups
    ]


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
