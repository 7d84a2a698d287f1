"""An estimator of velocities: a transformer over frames, units and the visible part of the mel.

Le et al., "Voicebox" (2023), as USDM has it: units in place of phones, positions by grouped
convolutions, the time as one more frame in front.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from raysft.families.flow_decoder.config import FlowDecoderConfig
from raysft.models.flow_parts import Attention, Silent, TimeEmbedding, blanked


class VoiceboxBlock(GradientCheckpointingLayer):
    """Attention, then two linear layers; each behind a norm."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn)
        self.ffn_out = nn.Linear(ffn, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x: [R, T, width]. mask: bool [R, T]."""
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.ffn_out(functional.gelu(self.ffn_in(self.ffn_norm(x))))


class ConvPositions(nn.Module):
    """Positions, told by what stands around a frame."""

    def __init__(self, width: int, reach: int, groups: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, reach, padding=reach // 2, groups=groups) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x: [R, T, width]. mask: bool [R, T]."""
        for conv in self.convs:
            x = functional.gelu(conv(blanked(x, mask).transpose(1, 2)).transpose(1, 2))
        return x


class Voicebox(nn.Module):
    """Frames on their way, with what is known of them -> velocities."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__()
        width, heads, depth, ffn = config.width, config.heads, config.depth, config.ffn
        assert width and heads and depth and ffn and config.unit_width
        bins = config.settings.bins
        given = 2 * bins + config.unit_width + (bins if config.speaker_width else 0)
        self.time = TimeEmbedding(width)
        self.frame_in = nn.Linear(given, width)
        self.positions = ConvPositions(
            width, config.conv_width, config.conv_groups, config.conv_depth
        )
        self.blocks = nn.ModuleList(VoiceboxBlock(width, heads, ffn) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
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
        """As `DiT.forward`; mean: [R, T, unit_width], of the speech units of each frame."""
        parts = [at.to(mean.dtype), mean, prompt.to(mean.dtype)]
        if speaker is not None:
            parts.append(speaker.unsqueeze(1).expand(-1, mean.shape[1], -1))
        x = self.frame_in(torch.cat(parts, -1))
        x = x + self.positions(x, mask)
        x = torch.cat([self.time(units).unsqueeze(1).to(x.dtype), x], 1)
        mask = functional.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.norm(x[:, 1:]))
