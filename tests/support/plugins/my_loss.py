"""A loss of tokens: how far the right answer is from certain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raysft.config.losses import TokenLoss, register

if TYPE_CHECKING:
    import torch


def doubt(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - p(target): float32 [M] of logits [M, V] and targets [M]."""
    return 1 - logits.softmax(-1).gather(-1, targets[:, None])[:, 0]


ROW = TokenLoss("doubt", "my_loss:doubt", "pulls answers towards certainty")
register(ROW)
