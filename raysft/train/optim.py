"""AdamW and the learning-rate schedule, as pure functions of the config and the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from raysft.config.schema import Optim


def make_optimizer(module: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only, not norms and biases."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "weight_decay": optim.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        fused=True,
    )


def warmup_steps(optim: Optim, total: int) -> int:
    """`optim.warmup` in steps: a count if >= 1, else a share of all steps."""
    return round(optim.warmup if optim.warmup >= 1 else optim.warmup * total)


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """The rate of step 1..total: linear warm-up, then constant, linear or cosine decay to zero."""
    warmup = warmup_steps(optim, total)
    if step <= warmup:
        return optim.lr * step / warmup
    if optim.schedule == "constant":
        return optim.lr
    # The last step still moves: decay reaches zero one step after it.
    progress = min(1.0, (step - 1 - warmup) / max(1, total - warmup))
    if optim.schedule == "linear":
        return optim.lr * (1.0 - progress)
    return optim.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next `optimizer.step()`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
