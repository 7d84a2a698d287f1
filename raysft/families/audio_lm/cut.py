"""Qwen2-Audio's encoder over what there is to hear, not over the 30 s that it was trained on.

transformers has it take rows of one length, of which its mask hides what lies behind a clip. Here
the convolutions read rows that are cut behind their clip, clips of about one length together
(`one_length.alike`); the layers read one row of all clips, the positions that are heard and no
other, each seeing its own clip (`models.attention`). What comes out is the same: the positions that
a mask hides are not seen by others, and the convolutions look two frames beyond a clip's end at
most.
"""

from __future__ import annotations

from itertools import accumulate
from types import MethodType

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from raysft.models import attention
from raysft.models.one_length import alike

BEYOND = 2  # frames behind a clip's last position that the convolutions look at


def attach(tower: Qwen2AudioEncoder) -> None:
    """Make `tower` take rows of any even number of frames, cut them, and pack what is heard."""
    vars(tower)["forward"] = MethodType(_forward, tower)
    tower.config._attn_implementation = attention.NAME


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
    # Where a part of the weights is gathered each time that it is used, by all workers together.
    whole = any(hasattr(parameter, "ds_id") for parameter in tower.conv1.parameters())
    groups = [list(range(clips))] if whole else alike(heard)
    rows = []
    for group in groups:
        longest = max(heard[row] for row in group)
        taken = input_features if len(group) == clips else input_features[group]
        made = _convolved(tower, taken[..., : frames_of(2 * longest, frames)])
        places = _places([heard[row] for row in group], made.shape[1])
        rows.append(made.flatten(0, 1).index_select(0, places.to(made.device)))
    order = [row for group in groups for row in group]
    lengths = [heard[row] for row in order]
    hidden = nn.functional.dropout(torch.cat(rows), tower.dropout, tower.training)
    hidden = _layers(tower, hidden.unsqueeze(0), lengths, kwargs)[0]
    parts: list[torch.Tensor] = [hidden] * clips
    longest = max(heard) + max(heard) % 2  # pairs of positions are averaged
    for row, part in zip(order, hidden.split(lengths), strict=True):
        parts[row] = nn.functional.pad(part, (0, 0, 0, longest - len(part)))
    pooled = tower.avg_pooler(torch.stack(parts).transpose(1, 2)).transpose(1, 2)
    return BaseModelOutput(last_hidden_state=tower.layer_norm(pooled))


def _heard(mask: torch.Tensor | None, clips: int, positions: int) -> list[int]:
    """Positions that each clip fills."""
    if mask is None:
        return [positions] * clips
    keys = mask if mask.ndim == 2 else mask[:, 0, 0]
    keys = keys == 0 if keys.is_floating_point() else keys.bool()
    return keys.sum(-1).tolist()


def _places(lengths: list[int], longest: int) -> torch.Tensor:
    """Of clips one after the other, each of `longest` positions, those that they fill."""
    filled = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return filled.flatten().nonzero().flatten()


def _convolved(tower: Qwen2AudioEncoder, features: torch.Tensor) -> torch.Tensor:
    """[clips, positions, width] of features [clips, mels, frames], with where each position is."""
    taken = features.to(tower.conv1.weight.dtype)
    hidden = nn.functional.gelu(tower.conv2(nn.functional.gelu(tower.conv1(taken))))
    hidden = hidden.transpose(1, 2)
    return hidden + tower.embed_positions.weight[: hidden.shape[1]]


def _layers(
    tower: Qwen2AudioEncoder,
    hidden: torch.Tensor,
    lengths: list[int],
    kwargs: dict[str, object],
) -> torch.Tensor:
    """[1, positions of all clips, width]. lengths: positions of each clip, in their order."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    mask = attention.document_mask(ends, hidden.device, causal=False)
    for layer in tower.layers:
        if tower.training and tower.layerdrop > 0 and torch.rand([]) < tower.layerdrop:
            continue
        hidden = layer(hidden, mask, **kwargs)
    return hidden
