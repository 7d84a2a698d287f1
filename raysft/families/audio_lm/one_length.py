"""An encoder that is given clips of one length at a time, unpadded.

Some encoders have no mask, or one that does not reach everything: what they make of a clip depends
on how long the row is that it lies in. Here each clip is encoded as if it were alone; clips of one
length share a call.

In a batch, padding is NaN: it says where a clip ends, wherever the tensor travels, and a frame of
it that were ever read would show in the loss. The encoder runs as often as there are lengths, on
each worker another number of times: so what shards parameters takes it as one part.
"""

from __future__ import annotations

from types import MethodType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from raysft.families.audio_lm.types import windowed


class _Windowed(Protocol):
    n_window: int

    def forward(
        self, features: torch.Tensor, feature_lens: torch.Tensor, **kwargs: object
    ) -> ModelOutput: ...


def attach(tower: nn.Module, windows: bool = False) -> None:
    """Make `tower` take clips of one length at a time. Its normalisation over batches stays at what
    it has learned, in training too.

    windows: it is given all clips as one row, and only those shorter than a window need it.
    """
    forward = _by_window if windows else _by_length
    tower.forward = MethodType(forward, tower)
    tower._z3_leaf = True  # type: ignore[assignment]  # DeepSpeed's name for a part of one piece
    for part in tower.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
            part.train = MethodType(_stay, part)  # type: ignore[method-assign]


def _stay(part: nn.Module, mode: bool = True) -> nn.Module:
    return part


def _by_length(
    tower: nn.Module, features: torch.Tensor, *args: object, **kwargs: object
) -> torch.Tensor | ModelOutput:
    """The encoder's forward. features: [clips, frames, mels], NaN behind each clip's end."""
    own = type(tower).forward
    ends = (~features.isnan().any(-1)).sum(1)
    lengths = ends.tolist()
    if min(lengths) == features.shape[1]:
        return own(tower, features, *args, **kwargs)
    order: list[int] = []
    found = []
    for length in sorted(set(lengths)):
        rows = [row for row, other in enumerate(lengths) if other == length]
        order += rows
        rest = [_cut(value, rows, features.shape, length) for value in args]
        named = {key: _cut(value, rows, features.shape, length) for key, value in kwargs.items()}
        found.append(own(tower, features[rows, :length], *rest, **named))
    back = torch.tensor(order, device=features.device).argsort()
    if isinstance(found[0], torch.Tensor):
        return _joined(found)[back]
    joined = {
        name: _joined([one[name] for one in found])[back]
        for name, value in found[0].items()
        if isinstance(value, torch.Tensor)
    }
    kind: type[ModelOutput] = type(found[0])
    return kind(**joined)


def _by_window(
    tower: _Windowed, features: torch.Tensor, feature_lens: torch.Tensor, **kwargs: object
) -> ModelOutput:
    """The encoder's forward. features: [mels, frames of all clips]; feature_lens: [clips]."""
    own = type(tower).forward
    window = 2 * tower.n_window
    lengths = feature_lens.tolist()
    groups = sorted({min(length, window) for length in lengths})
    if len(groups) == 1:
        return own(tower, features, feature_lens=feature_lens, **kwargs)
    clips = features.split(lengths, 1)
    parts: list[torch.Tensor] = [features] * len(clips)
    for group in groups:
        rows = [row for row, length in enumerate(lengths) if min(length, window) == group]
        found = own(
            tower,
            torch.cat([clips[row] for row in rows], 1),
            feature_lens=feature_lens[rows],
            **kwargs,
        )
        sizes = [windowed(lengths[row], window) for row in rows]
        for row, part in zip(rows, found.last_hidden_state.split(sizes), strict=True):
            parts[row] = part
    joined = torch.cat(parts)
    return type(found)(last_hidden_state=joined, pooler_output=joined)


def _cut(value: object, rows: list[int], shape: torch.Size, length: int) -> object:
    """Of a mask [clips, frames] what belongs to these clips."""
    if isinstance(value, torch.Tensor) and value.shape == shape[:2]:
        return value[rows, :length]
    return value


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """[clips, positions, ...] of all, padded with zeros."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(p, (0, 0) * (p.ndim - 2) + (0, longest - p.shape[1])) for p in parts])
