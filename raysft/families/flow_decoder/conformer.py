"""The encoder: rows of codes -> frames, each a mean of what the mel will be.

As CosyVoice 2's: blocks of attention with relative positions (Dai et al., Transformer-XL, 2019),
without the convolutions and the second feed-forward that conformers have. Before the first each row
looks a few rows ahead; between the two stacks each row becomes as many as it has frames.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from raysft.families.flow_decoder.config import FlowDecoderConfig
from raysft.models.flow_parts import blanked, by_heads, joined, waves


class RelativeAttention(nn.Module):
    """Attention by content, and by how far apart two rows are."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.to_position = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, width // heads))
        self.position_bias = nn.Parameter(torch.zeros(heads, width // heads))

    def forward(self, x: torch.Tensor, distances: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x: [R, T, width]. distances: [2 T - 1, width], waves of T - 1, ..., 1 - T. mask: bool
        [R, T]."""
        query, key, value = (
            by_heads(linear(x), self.heads) for linear in (self.to_q, self.to_k, self.to_v)
        )
        apart = by_heads(self.to_position(distances.to(x.dtype)).unsqueeze(0), self.heads)
        length, size = query.shape[-2:]
        by_distance = (query + self.position_bias.unsqueeze(1)) @ apart.transpose(-1, -2)
        bias = _by_place(by_distance, length) / math.sqrt(size)
        bias = bias.masked_fill(~mask[:, None, None], float("-inf"))
        found = functional.scaled_dot_product_attention(
            query + self.content_bias.unsqueeze(1),
            key,
            value,
            bias.to(query.dtype),
            self.dropout if self.training else 0.0,
        )
        return self.to_out(joined(found))


def _by_place(by_distance: torch.Tensor, length: int) -> torch.Tensor:
    """of distances T - 1, ..., 1 - T -> [R, H, T, T]: of i and j, that of i - j."""
    at = torch.arange(length, device=by_distance.device)
    place = length - 1 - (at.unsqueeze(1) - at.unsqueeze(0))
    return by_distance.gather(-1, place.expand(*by_distance.shape[:2], -1, -1))


class ConformerBlock(GradientCheckpointingLayer):
    """Attention, then two linear layers; each behind a norm."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__()
        width, self.dropout = config.encoder_width, float(config.encoder_dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = RelativeAttention(width, config.encoder_heads, self.dropout)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, config.encoder_ffn)
        self.ffn_out = nn.Linear(config.encoder_ffn, width)

    def forward(self, x: torch.Tensor, distances: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As `RelativeAttention`."""
        x = x + self._dropped(self.attention(self.attention_norm(x), distances, mask))
        inner = self._dropped(functional.silu(self.ffn_in(self.ffn_norm(x))))
        return x + self._dropped(self.ffn_out(inner))

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, self.dropout, self.training)


class Lookahead(nn.Module):
    """Each row with what stands ahead of it, and what came of the two before."""

    def __init__(self, width: int, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.forwards = nn.Conv1d(width, width, ahead + 1)
        self.backwards = nn.Conv1d(width, width, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x: [R, N, width]. mask: bool [R, N]."""
        found = functional.pad(blanked(x, mask).transpose(1, 2), (0, self.ahead))
        found = functional.leaky_relu(self.forwards(found))
        return x + self.backwards(functional.pad(found, (2, 0))).transpose(1, 2)


class Entry(nn.Module):
    """What stands before a stack: a linear layer and a norm."""

    def __init__(self, given: int, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(given, width)
        self.norm = nn.LayerNorm(width)
        self.width, self.dropout = width, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[R, N, given] -> [R, N, width]."""
        found = self.norm(self.linear(x)) * math.sqrt(self.width)
        return functional.dropout(found, self.dropout, self.training)


class UpsampleConformer(nn.Module):
    """Rows of codes, embedded -> frames."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__()
        assert config.unit_width is not None
        width, dropout = config.encoder_width, float(config.encoder_dropout)
        self.width, self.upsample = width, config.upsample
        self.entry = Entry(config.unit_width, width, dropout)
        self.lookahead = Lookahead(width, config.lookahead)
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.encoder_blocks))
        self.up_conv = nn.Conv1d(width, width, 2 * config.upsample + 1)
        self.up_entry = Entry(width, width, dropout)
        self.up_blocks = nn.ModuleList(
            ConformerBlock(config) for _ in range(config.encoder_up_blocks)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x: [R, N, unit_width]. mask: bool [R, N] -> [R, N * upsample, width]."""
        x = self.lookahead(self.entry(x), mask)
        x = self._through(self.blocks, x, mask)
        x = x.repeat_interleave(self.upsample, 1)
        mask = mask.repeat_interleave(self.upsample, 1)
        x = functional.pad(x.transpose(1, 2), (2 * self.upsample, 0))  # it sees no row ahead
        x = self.up_entry(self.up_conv(x).transpose(1, 2))
        return self.norm(self._through(self.up_blocks, x, mask))

    def _through(self, blocks: nn.ModuleList, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        distances = waves(torch.arange(length - 1, -length, -1, device=x.device), self.width)
        for block in blocks:
            x = block(x, distances, mask)
        return x
