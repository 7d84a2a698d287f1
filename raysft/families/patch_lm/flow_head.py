"""The flow head: a small transformer that predicts the velocity of the frames of one patch.

Under `net`. A patch is one short row: a token of the condition and the time, the frames of the
patch before, and the noisy frames of this one; the last are read out. So every patch is computed
for itself, whatever else is in the batch.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

TIMES = 256  # values that a time becomes
T_SCALE = 1000.0  # times are spread over this
T_UNITS = 1 << 24
"""Times are whole numbers of these, so that no half precision rounds them: t = units / T_UNITS."""


class FlowBlock(GradientCheckpointingLayer):
    """A layer: attention of all tokens to all, then two linear layers; each behind an RMSNorm."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, inner)
        self.mlp_out = nn.Linear(inner, width)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [Q, T, width] -> the same."""
        x = x + self._dropped(self.to_out(self._attended(self.attention_norm(x))))
        inner = functional.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + self._dropped(self.mlp_out(self._dropped(inner)))

    def _attended(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        shape = (rows, tokens, self.heads, width // self.heads)
        query, key, value = (
            linear(x).view(shape).transpose(1, 2) for linear in (self.to_q, self.to_k, self.to_v)
        )
        query, key = _rotated(query), _rotated(key)
        found = functional.scaled_dot_product_attention(query, key, value)
        return found.transpose(1, 2).reshape(rows, tokens, width)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, self.dropout, self.training)


class FlowHead(nn.Module):
    """Condition, time, history and noisy frames -> velocity of the frames."""

    def __init__(
        self,
        latent: int,
        condition: int,
        width: int,
        depth: int,
        heads: int,
        mlp: float,
        dropout: float,
    ) -> None:
        """latent: values of a frame. condition: of the hidden states. mlp: times `width`."""
        super().__init__()
        self.frame_in = nn.Linear(latent, width)
        self.condition_in = nn.Linear(condition, width)
        self.time_in = nn.Linear(TIMES, width)
        self.time_out = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            FlowBlock(width, heads, int(width * mlp), dropout) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.out = nn.Linear(width, latent)

    def forward(
        self,
        noisy: torch.Tensor,
        units: torch.Tensor,
        condition: torch.Tensor,
        history: torch.Tensor,
    ) -> torch.Tensor:
        """noisy: [Q, S, latent], on their way from noise (t 0) to speech (t 1). units: int64 [Q],
        t in T_UNITS. condition: [Q, condition]. history: [Q, S, latent], the patch before.
        Returns [Q, S, latent]."""
        frames = noisy.shape[1]
        first = self._time(units, condition) + self.condition_in(condition)
        x = torch.cat([first.unsqueeze(1), self.frame_in(history), self.frame_in(noisy)], 1)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, -frames:]))

    def _time(self, units: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        half = TIMES // 2
        t = units.float() / T_UNITS * T_SCALE
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angles = t.unsqueeze(1) * rates
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        return self.time_out(functional.silu(self.time_in(waves.to(like.dtype))))


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions 0, 1, ... on all of a head (Su et al., RoFormer, 2021). x: [Q, heads, T, d],
    pairs are the halves of d."""
    tokens, size = x.shape[-2:]
    half = size // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
    angles = torch.arange(tokens, device=x.device).unsqueeze(1) * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, two = x[..., :half], x[..., half : 2 * half]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, x[..., 2 * half :]], -1)
