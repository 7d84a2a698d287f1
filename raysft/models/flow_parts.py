"""What networks that predict velocities are built of: times, attention, rotary positions."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

T_UNITS = 1 << 24
"""Times are whole numbers of these, so that no half precision rounds them: t = units / T_UNITS."""
T_SCALE = 1000.0  # times are spread over this
TIMES = 256  # values that a time becomes


class Silent(nn.Linear):
    """A linear layer that is zero in a new net: it lets nothing through yet."""


class TimeEmbedding(nn.Module):
    """A time -> a vector: waves, and two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(TIMES, width)
        self.second = nn.Linear(width, width)

    def forward(self, units: torch.Tensor) -> torch.Tensor:
        """units: int64 [R], t in T_UNITS -> [R, width]."""
        times = units.float() / T_UNITS * T_SCALE
        found = waves(times, TIMES).to(self.first.weight.dtype)
        return self.second(functional.silu(self.first(found)))


class Attention(nn.Module):
    """Self-attention of all frames of a row to each other, with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x: [R, T, width]. mask: bool [R, T], what there is; None: all."""
        query, key, value = (
            by_heads(linear(x), self.heads) for linear in (self.to_q, self.to_k, self.to_v)
        )
        found = functional.scaled_dot_product_attention(
            rotated(query), rotated(key), value, None if mask is None else mask[:, None, None]
        )
        return self.to_out(joined(found))


def by_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[R, T, width] -> [R, heads, T, width / heads]."""
    rows, length, width = x.shape
    return x.view(rows, length, heads, width // heads).transpose(1, 2)


def joined(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `by_heads`."""
    rows, heads, length, size = x.shape
    return x.transpose(1, 2).reshape(rows, length, heads * size)


def waves(at: torch.Tensor, size: int) -> torch.Tensor:
    """Cosines and sines of `at` [N] at size / 2 rates from 1 to 1 / 10,000: float32 [N, size]."""
    half = size // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=at.device) / half)
    angles = at.float().unsqueeze(1) * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions 0, 1, ... (Su et al., RoFormer, 2021). x: [R, heads, T, d]; pairs are the
    halves of d."""
    length, size = x.shape[-2:]
    half = size // 2
    cos, sin = waves(torch.arange(length, device=x.device), 2 * half).to(x.dtype).chunk(2, 1)
    one, two = x[..., :half], x[..., half : 2 * half]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, x[..., 2 * half :]], -1)


def blanked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x [R, T, width] with zeros where there is nothing, so that a convolution sees at a row's end
    what it would see of the row alone."""
    return x * mask.unsqueeze(-1).to(x.dtype)
