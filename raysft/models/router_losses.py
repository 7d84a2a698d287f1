"""Losses of the routers of a mixture: balance, so that experts are used alike, and the z-loss.

By layer, and added over layers. Over tokens t of a kind with n experts, of which each goes to k:

    balance   sum_e f_e p_e, f_e = n / (k T) times the tokens that went to expert e, p_e the mean
              of their shares of e (Switch Transformer, Fedus et al. 2021, equations 4 to 6); 1
              where all experts are used alike
    z         the mean of logsumexp(logits of its experts)^2 (ST-MoE, Zoph et al. 2022, equation 5)

`balance_over: batch`: T are the tokens of a micro-batch; the balance loss of a step is the mean
over its tokens. `sequence`: T are the tokens of one sequence, of all kinds, and n is the number of
all experts (DeepSeek-V2, 2024, equations 23 to 25; so does MoST, on the scores that are left after
those of other kinds were set to 0); that of a step is the mean over its sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from raysft.losses.term import Term

if TYPE_CHECKING:
    from raysft.models.routing import Routing


@dataclass(frozen=True)
class Weights:
    """What the losses are multiplied by; 0: it is none of what is trained."""

    balance: float = 0.0
    z: float = 0.0
    over: Literal["batch", "sequence"] = "batch"


def losses_of(
    routing: Routing,
    logits: torch.Tensor,
    shares: torch.Tensor,
    chosen: torch.Tensor,
    of_kind: torch.Tensor,
) -> torch.Tensor:
    """Sums of one router, float32 [2, kinds]: of the balance loss over tokens (or in the first
    place, over sequences), and of the z-loss over tokens.

    logits, shares float32 [T, experts]; chosen [T, experts]: 1 where a token goes; of_kind
    [T, kinds]: 1 where it is of that kind, nowhere for padding.
    """
    squares = logits.logsumexp(1).square()
    z = of_kind.T @ squares
    if routing.weights is not None and routing.weights.over == "sequence":
        first = _by_sequence(routing, shares, chosen, of_kind.sum(1))
        balance = torch.cat([first.unsqueeze(0), z.new_zeros(len(z) - 1)])
    else:
        counts = of_kind.T @ chosen
        sizes = torch.tensor(routing.sizes, dtype=torch.float32, device=logits.device)
        factors = sizes.unsqueeze(1) * counts / counts.sum(1, keepdim=True).clamp(min=1)
        balance = (factors * (of_kind.T @ shares)).sum(1)
    return torch.stack([balance, z])


def _by_sequence(
    routing: Routing, shares: torch.Tensor, chosen: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    sequences = routing.sequences
    assert sequences is not None
    each = torch.arange(routing.rows, device=shares.device).unsqueeze(1)
    of_sequence = (each == sequences.to(shares.device)).float() * real  # [sequences, T]
    counts, sums = of_sequence @ chosen, of_sequence @ shares
    factors = shares.shape[1] * counts / counts.sum(1, keepdim=True).clamp(min=1)
    return (factors * sums / of_sequence.sum(1, keepdim=True).clamp(min=1)).sum()


def terms_of(routing: Routing) -> list[Term]:
    """The terms of the forward pass that has just ended; [] where none are asked for."""
    weights = routing.weights
    if weights is None or not routing.losses:
        return []
    sums = torch.stack(routing.losses).sum(0)
    counts = routing.counted()
    found = []

    def add(
        name: str, each: torch.Tensor, count: torch.Tensor, counted: str, weight: float
    ) -> None:
        term = Term(name, each.detach(), count, {}, each, counted, weight, aside=True)
        found.append(term)

    if weights.balance and weights.over == "sequence":
        add("balance", sums[0, 0], routing.sequences_counted(), "sequences", weights.balance)
    for number, kind in enumerate(routing.kinds):
        name, counted = (f"/{kind}" if kind else ""), f"kind/{kind}"
        if weights.balance and weights.over == "batch":
            add(f"balance{name}", sums[0, number], counts[number], counted, weights.balance)
        if weights.z:
            add(f"z{name}", sums[1, number], counts[number], counted, weights.z)
    return found
