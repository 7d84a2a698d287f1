"""Routers of transformers' mixtures: what they do, and the same for some of their experts.

A standard router gives, for each token, scores of all experts, the k experts it goes to and their
weights. `restricted` calls a router's own forward as if it had only some experts, with those rows
of its weight: whatever its choice is made of (sigmoids with a correction, groups of experts) is its
model's own. `scoring_of` tells what its weights are of its scores, by asking it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from raysft.json_types import JsonObject

GROUPS = ("num_group", "n_group")  # of experts that are chosen before experts are
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Logits [T, experts], weights and ids of the chosen [T, k]."""


def routers(net: nn.Module) -> dict[str, nn.Module]:
    """Names and modules that choose among a net's experts, from its first layer on."""
    return {name: module for name, module in net.named_modules() if _is_router(module)}


def _is_router(module: nn.Module) -> bool:
    known = ("num_experts", "top_k")
    if "router" not in type(module).__name__.lower():
        return False
    if not all(type(getattr(module, name, None)) is int for name in known):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2


@dataclass(frozen=True)
class Scoring:
    """What the weights of a token's experts are: shares (softmax) or sigmoids of its logits, made
    to sum to 1 or not, times `scale`."""

    scores: Literal["softmax", "sigmoid"]
    normalised: bool
    scale: float


class Restricted:
    """Stands for a router while its forward runs: of every tensor that has a row an expert, the
    rows of some experts.

    values: attributes that have other values.
    """

    def __init__(self, router: nn.Module, rows: slice | torch.Tensor, **values: object) -> None:
        self.__dict__.update(_router=router, _rows=rows, _values=values)

    def __getattr__(self, name: str) -> object:
        values = self.__dict__["_values"]
        if name in values:
            return values[name]
        router = self.__dict__["_router"]
        found = getattr(router, name)
        if isinstance(found, torch.Tensor) and found.shape[:1] == (router.num_experts,):
            return found[self.__dict__["_rows"]]
        return found


def settings_of(router: nn.Module, experts: Sequence[int], top_k: int) -> JsonObject:
    """The attributes of a router of these experts only. Raises ValueError, with the reason, where
    it cannot have them."""
    every: int = router.num_experts  # type: ignore[assignment]
    found: JsonObject = {"num_experts": len(experts), "top_k": top_k}
    if getattr(router, "topk_method", None) == "greedy":
        return found
    for name in GROUPS:
        groups = getattr(router, name, None)
        if not isinstance(groups, int) or groups == 1:
            continue
        size = every // groups
        own = sorted({expert // size for expert in experts})
        if list(experts) != [i * size + j for i in own for j in range(size)]:
            raise ValueError(
                f"its router chooses among {groups} groups of {size} experts first: a kind needs "
                f"whole groups, such as 0-{size - 1}"
            )
        taken = router.topk_group
        assert isinstance(taken, int)
        most = min(len(own), taken)
        found |= {name: len(own), "topk_group": most}
        if most * size < top_k:
            raise ValueError(
                f"its router takes {most} groups of {size} experts, fewer than {top_k}"
            )
    return found


def restricted(
    router: nn.Module,
    rows: slice | torch.Tensor,
    settings: JsonObject,
    hidden: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> Routed:
    """What `router` says of hidden states [T, hidden] as if it had the experts of `rows` only; ids
    count these. settings: as `settings_of` gives them. weight: in place of its own."""
    values = settings if weight is None else settings | {"weight": weight[rows]}
    # Of the class: an instance's own forward is what calls this.
    return type(router).forward(Restricted(router, rows, **values), hidden)


def _columns(router: nn.Module) -> int:
    weight = router.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[1]


def scoring_of(router: nn.Module) -> Scoring | None:
    """What the router computes; None: it is none of those that are known."""
    if len(inspect.signature(type(router).forward).parameters) != 2:
        return None
    known = {"num_experts": router.num_experts, "top_k": router.top_k}
    try:
        logits, weights, ids = try_out(router, range(router.num_experts), known)  # type: ignore
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError):
        return None
    if weights.shape != ids.shape or ids.is_floating_point():
        return None
    softmax, sigmoid = logits.softmax(-1).gather(1, ids), logits.sigmoid().gather(1, ids)
    for scores, own in (("softmax", softmax), ("sigmoid", sigmoid)):
        for normalised in (False, True):
            expected = own / own.sum(-1, keepdim=True) if normalised else own
            scale = (weights / expected).mean().item()
            if torch.allclose(weights, scale * expected, rtol=1e-4, atol=1e-6):
                return Scoring(scores, normalised, scale)  # type: ignore[arg-type]
    return None


@torch.no_grad()
def try_out(router: nn.Module, experts: Sequence[int], settings: JsonObject) -> Routed:
    """What a router like this one, with random weights, says of eight tokens; of these experts.

    Asks neither for its weights, which may not be there yet, nor for its device."""
    generator = torch.Generator().manual_seed(0)
    values = dict(settings)
    tensors = [*router.named_parameters(recurse=False), *router.named_buffers(recurse=False)]
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        for name, tensor in tensors:
            values[name] = torch.zeros(len(experts), *tensor.shape[1:])
        hidden_dim = _columns(router)
        values["weight"] = torch.randn(len(experts), hidden_dim, generator=generator)
        values["weight"] /= hidden_dim**0.5
        hidden = torch.randn(8, hidden_dim, generator=generator)
        rows = torch.tensor(list(experts))
        logits, weights, ids = type(router).forward(Restricted(router, rows, **values), hidden)
    return logits.float(), weights.float(), ids
