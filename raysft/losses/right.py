"""Which learnt tokens the model would have said: counts beside the losses of an evaluation."""

from __future__ import annotations

from collections.abc import Collection

import torch

from raysft.losses.chunked import TokenLoss

RIGHT = "token_right"


def right(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Float32 [M]: 1 where the likeliest token is the target. logits [M, V]; targets [M]."""
    return (logits.argmax(-1) == targets).float()


def of_targets(ids: Collection[int]) -> tuple[TokenLoss, TokenLoss]:
    """Which targets are among `ids`, and which of those the model would have said."""
    wanted = sorted(ids)

    def seen(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.isin(targets, torch.tensor(wanted, device=targets.device)).float()

    def hit(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return seen(logits, targets) * right(logits, targets)

    return seen, hit
