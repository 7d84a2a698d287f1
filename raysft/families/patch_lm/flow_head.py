"""The flow head: a small transformer that predicts the velocity of the frames of one patch.

Under `net`. A patch is one short row: a token of the condition and the time, the frames of the
patch before, and the noisy frames of this one; the last are read out. So every patch is computed
for itself, whatever else is in the batch.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from raysft.models.flow_parts import Attention, TimeEmbedding


class FlowBlock(GradientCheckpointingLayer):
    """A layer: attention of all tokens to all, then two linear layers; each behind an RMSNorm."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, inner)
        self.mlp_out = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [Q, T, width] -> the same."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        inner = functional.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + self.dropout(self.mlp_out(self.dropout(inner)))


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
        self.time = TimeEmbedding(width)
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
        t in `flow_parts.T_UNITS`. condition: [Q, condition]. history: [Q, S, latent], the patch
        before. Returns [Q, S, latent]."""
        frames = noisy.shape[1]
        first = self.time(units) + self.condition_in(condition)
        x = torch.cat([first.unsqueeze(1), self.frame_in(history), self.frame_in(noisy)], 1)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, -frames:]))
