"""z-loss: the squared log-partition of each token's softmax.

Keeps logits from drifting, which bf16 rounds the coarser the larger they are. PaLM (Chowdhery et
al. 2022, section 5) adds 1e-4 times log^2 Z to the cross-entropy.
"""

from __future__ import annotations

import torch


def z_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Float32 [M] of logits [M, V]; targets are not looked at."""
    return logits.logsumexp(-1).square()
