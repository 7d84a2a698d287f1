"""Qwen2-Audio's encoder over what there is to hear, not over the 30 s that it was trained on.

transformers has it take rows of one length, of which its mask hides what lies behind a clip. Here
rows are cut behind their clip, and clips of about one length go together (`one_length.alike`). What
is left is the same: the positions that a mask hides are not seen by others, and the convolutions
look two frames beyond a clip's end at most.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from raysft.models.one_length import alike, calls, together

BEYOND = 2  # frames behind a clip's last position that the convolutions look at


def attach(tower: Qwen2AudioEncoder) -> None:
    """Make `tower` take rows of any even number of frames, and cut them."""
    vars(tower)["forward"] = MethodType(_forward, tower)


def frames_of(frames: int, limit: int) -> int:
    """Frames that rows need for a longest clip of so many: an even number, up to `limit`."""
    return min(limit, frames + frames % 2 + BEYOND)


def _forward(
    tower: Qwen2AudioEncoder,
    input_features: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: object,
) -> BaseModelOutput:
    """The encoder's forward. input_features: [clips, mels, frames]. attention_mask: of half as many
    positions, [clips, positions] or [clips, 1, positions, positions], true or 0 where they are
    heard; None: all of them."""
    clips, _, frames = input_features.shape
    heard = _heard(attention_mask, clips, frames // 2)
    groups = alike(heard)

    def call(number: int) -> torch.Tensor:
        rows = groups[number]
        cut = frames_of(2 * max(heard[row] for row in rows), frames)
        mask = attention_mask
        if mask is not None:
            mask = mask[rows, : cut // 2] if mask.ndim == 2 else mask[rows]
            mask = mask if mask.ndim == 2 else mask[..., : cut // 2, : cut // 2]
        taken = input_features if len(rows) == clips else input_features[rows]
        return encoded(tower, taken[..., :cut], mask, kwargs)

    found, nothing = calls(tower, call, len(groups), input_features.device)
    order = torch.tensor([row for rows in groups for row in rows], device=input_features.device)
    made = found[0] if len(groups) == 1 else together(found).index_select(0, order.argsort())
    return BaseModelOutput(last_hidden_state=made + nothing)


def _heard(mask: torch.Tensor | None, clips: int, positions: int) -> list[int]:
    """Positions that each clip fills."""
    if mask is None:
        return [positions] * clips
    keys = mask if mask.ndim == 2 else mask[:, 0, 0]
    keys = keys == 0 if keys.is_floating_point() else keys.bool()
    return keys.sum(-1).tolist()


def encoded(
    tower: Qwen2AudioEncoder,
    features: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, object],
) -> torch.Tensor:
    """[clips, positions / 2, width]: two convolutions, layers, and pairs of positions averaged."""
    taken = features.to(tower.conv1.weight.dtype)
    hidden = nn.functional.gelu(tower.conv2(nn.functional.gelu(tower.conv1(taken))))
    hidden = hidden.transpose(1, 2)
    hidden = hidden + tower.embed_positions.weight[: hidden.shape[1]]
    hidden = nn.functional.dropout(hidden, tower.dropout, tower.training)
    for layer in tower.layers:
        if tower.training and tower.layerdrop > 0 and torch.rand([]) < tower.layerdrop:
            continue
        hidden = layer(hidden, mask, **kwargs)
    pooled = tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
    return tower.layer_norm(pooled)
