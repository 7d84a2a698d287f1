"""An estimator of velocities: a transformer whose norms are steered by the time (adaLN-zero).

Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), on frames of a mel. Each
frame is given where it stands on its way, the encoder's mean of it, the speaker, and the mel itself
where it is a prompt.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from raysft.families.flow_decoder.config import FlowDecoderConfig
from raysft.models.flow_parts import Attention, Silent, TimeEmbedding


class DiTBlock(GradientCheckpointingLayer):
    """Attention, then two linear layers, each shifted, scaled and let through as the time says."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.ffn_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ffn_in = nn.Linear(width, ffn)
        self.ffn_out = nn.Linear(ffn, width)
        self.steer = Silent(width, 6 * width)

    def forward(self, x: torch.Tensor, time: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x: [R, T, width]. time: [R, width]. mask: bool [R, T]."""
        steered = self.steer(functional.silu(time)).unsqueeze(1).chunk(6, -1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = steered
        x = x + gate * self.attention(self.attention_norm(x) * (1 + scale) + shift, mask)
        inner = self.ffn_in(self.ffn_norm(x) * (1 + ffn_scale) + ffn_shift)
        return x + ffn_gate * self.ffn_out(functional.gelu(inner, approximate="tanh"))


class DiT(nn.Module):
    """Frames on their way, with what is known of them -> velocities."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__()
        width, heads, depth, ffn = config.width, config.heads, config.depth, config.ffn
        assert width and heads and depth and ffn
        bins = config.settings.bins
        given = (4 if config.speaker_width else 3) * bins
        self.time = TimeEmbedding(width)
        self.frame_in = nn.Linear(given, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, ffn) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.steer = Silent(width, 2 * width)
        self.out = Silent(width, bins)

    def forward(
        self,
        at: torch.Tensor,
        units: torch.Tensor,
        mean: torch.Tensor,
        prompt: torch.Tensor,
        speaker: torch.Tensor | None,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """at, mean, prompt: [R, T, bins]. units: int64 [R]: see `parts`. speaker: [R, bins]. mask:
        bool [R, T]. Returns [R, T, bins]."""
        parts = [at.to(mean.dtype), mean, prompt.to(mean.dtype)]
        if speaker is not None:
            parts.insert(2, speaker.unsqueeze(1).expand_as(mean))
        x, time = self.frame_in(torch.cat(parts, -1)), self.time(units)
        for block in self.blocks:
            x = block(x, time, mask)
        shift, scale = self.steer(functional.silu(time)).unsqueeze(1).chunk(2, -1)
        return self.out(self.norm(x) * (1 + scale) + shift)
