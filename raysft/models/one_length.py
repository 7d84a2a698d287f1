"""An encoder that is given clips of one length at a time, unpadded; or of about one length.

Some encoders have no mask, or one that does not reach everything: what they make of a clip depends
on how long the row is that it lies in. Here each clip is encoded as if it were alone; clips of one
length share a call.

In a batch, padding is NaN: it says where a clip ends, wherever the tensor travels, and a frame of
it that were ever read would show in the loss. The encoder runs as often as there are lengths, which
differs from worker to worker. Where its parameters are sharded, each call brings them together, a
collective: then all workers make as many calls as the one with most lengths, with a clip of theirs
again, whose output counts for nothing.

Where an encoder's mask makes it exact, padding costs all the same: one clip of 30 s among a hundred
of 1 s makes rows of 30 s of all. Such an encoder is given clips of which none is shorter than half
the longest (`attach_alike`), so that it computes less than twice what there is to hear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from raysft.parallel.unsharded import stays_whole

Positions = Callable[[Any, np.ndarray], np.ndarray]
Output = Any  # a tensor or a ModelOutput, which is what its class gives


class _Windowed(Protocol):
    n_window: int


class Hears(Protocol):
    """A model of transformers that makes embeddings of clips."""

    config: PreTrainedConfig

    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor, **more: object
    ) -> BaseModelOutputWithPooling: ...


@dataclass
class _Heard(BaseModelOutputWithPooling):
    """Embeddings of all clips, [positions, width], and of which of them there is something: all."""

    attention_mask: torch.Tensor | None = None


def attach(tower: nn.Module, windowed: Callable[[int, int], int] | None = None) -> None:
    """Make `tower` take clips of one length at a time. Its normalisation over batches stays at what
    it has learned, in training too.

    windowed: (frames, a window's) -> positions of a clip, where the encoder is given all clips as
        one row, and only those shorter than a window need it.
    """
    forward = _by_length if windowed is None else partial(_by_window, windowed)
    tower.forward = MethodType(forward, tower)
    for part in tower.modules():
        if isinstance(part, _BatchNorm):
            part.eval()
            part.train = MethodType(_stay, part)  # type: ignore[method-assign]
            part.forward = MethodType(_normalise, part)  # type: ignore[method-assign]


def attach_alike(model: Hears, positions: Positions, multiple: int, time: int) -> None:
    """Make `model.get_audio_features` take clips of about one length at a time.

    positions: (config, frames of each clip) -> positions that it makes of each. multiple: its rows
    are as long as a multiple of it. time: axis of the frames among its features.
    """

    def get_audio_features(
        self: Hears, input_features: torch.Tensor, input_features_mask: torch.Tensor, **more: object
    ) -> _Heard:
        lengths = input_features_mask.sum(-1).tolist()
        groups = alike(lengths)

        def call(number: int) -> torch.Tensor:
            rows = groups[number]
            longest = -(-max(lengths[row] for row in rows) // multiple) * multiple
            features = input_features[rows].narrow(time, 0, longest)
            found = type(self).get_audio_features(
                self, features, input_features_mask[rows, :longest], **more
            )
            valid = found.get("attention_mask")
            made = found.pooler_output
            return made if valid is None else made[valid]

        found, nothing = calls(self, call, len(groups), input_features.device)
        parts: dict[int, torch.Tensor] = {}
        for rows, one in zip(groups, found, strict=True):
            sizes = positions(self.config, np.array([lengths[row] for row in rows])).tolist()
            parts |= zip(rows, one.split(sizes), strict=True)
        joined = torch.cat([parts[row] for row in range(len(lengths))]) + nothing
        whole = torch.ones(len(joined), dtype=torch.bool, device=joined.device)
        return _Heard(pooler_output=joined, attention_mask=whole)

    vars(model)["get_audio_features"] = MethodType(get_audio_features, model)


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Clips by length, the longest first: of a group none is shorter than half its longest. Of each
    clip its place among `lengths`, in their order."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or 2 * lengths[row] < lengths[groups[-1][0]]:  # its longest is its first
            groups.append([])
        groups[-1].append(row)
    return [sorted(group) for group in groups]


def _stay(part: nn.Module, mode: bool = True) -> nn.Module:
    return part


def _normalise(part: _BatchNorm, hidden: torch.Tensor) -> torch.Tensor:
    """As torch does. What it has learned of batches is in float32 also where DeepSpeed has weights
    in half precision, which torch does not take together."""
    own = type(part).forward
    if part.weight is None or part.running_mean is None:
        return own(part, hidden)
    if part.weight.dtype == part.running_mean.dtype:
        return own(part, hidden)
    kind, mean, variance = part.running_mean.dtype, part.running_mean, part.running_var
    weight, bias = part.weight.to(kind), part.bias.to(kind)
    made = F.batch_norm(hidden.to(kind), mean, variance, weight, bias, eps=part.eps)
    return made.to(hidden.dtype)


def _by_length(
    tower: nn.Module, features: torch.Tensor | None = None, *args: object, **kwargs: object
) -> Output:
    """The encoder's forward. features: [clips, frames, mels] or [clips, samples], NaN behind each
    clip's end."""
    own = type(tower).forward
    if features is None:  # transformers' generation names it
        named_so = kwargs.pop(str(tower.main_input_name))
        assert isinstance(named_so, torch.Tensor)
        features = named_so
    ended = features.isnan() if features.ndim == 2 else features.isnan().any(-1)
    lengths = (~ended).sum(1).tolist()
    groups = [
        (length, [row for row, other in enumerate(lengths) if other == length])
        for length in sorted(set(lengths))
    ]

    def call(number: int) -> Output:
        length, rows = groups[number]
        rest = [_cut(value, rows, features.shape, length) for value in args]
        named = {key: _cut(value, rows, features.shape, length) for key, value in kwargs.items()}
        return own(tower, features[rows, :length], *rest, **named)

    found, nothing = calls(tower, call, len(groups), features.device)
    order = [row for _, rows in groups for row in rows]
    back = torch.tensor(order, device=features.device).argsort()
    if isinstance(found[0], torch.Tensor):
        return together(found)[back] + nothing
    joined = {
        name: together([one[name] for one in found])[back]
        for name, value in found[0].items()
        if isinstance(value, torch.Tensor)
    }
    kind: type[ModelOutput] = type(found[0])
    return kind(**joined | {"last_hidden_state": joined["last_hidden_state"] + nothing})


def _by_window(
    windowed: Callable[[int, int], int],
    tower: _Windowed,
    features: torch.Tensor,
    feature_lens: torch.Tensor,
    **kwargs: object,
) -> Output:
    """The encoder's forward. features: [mels, frames of all clips]; feature_lens: [clips]."""
    own = type(tower).forward  # type: ignore[attr-defined]
    window = 2 * tower.n_window
    lengths = feature_lens.tolist()
    clips = features.split(lengths, 1)
    groups = [
        [row for row, length in enumerate(lengths) if min(length, window) == group]
        for group in sorted({min(length, window) for length in lengths})
    ]

    def call(number: int) -> Output:
        rows = groups[number]
        chosen = torch.cat([clips[row] for row in rows], 1)
        return own(tower, chosen, feature_lens=feature_lens[rows], **kwargs)

    found, nothing = calls(tower, call, len(groups), features.device)
    parts: dict[int, torch.Tensor] = {}
    for rows, one in zip(groups, found, strict=True):
        sizes = [windowed(lengths[row], window) for row in rows]
        parts |= zip(rows, one.last_hidden_state.split(sizes), strict=True)
    joined = torch.cat([parts[row] for row in range(len(clips))]) + nothing
    return type(found[0])(last_hidden_state=joined, pooler_output=joined)


def calls(
    tower: object, call: Callable[[int], Output], count: int, device: torch.device
) -> tuple[list[Output], torch.Tensor]:
    """What `call` gives for each of `count` groups, and a zero on which all further calls hang."""
    rounds, nothing = count, torch.zeros((), device=device)
    if isinstance(tower, nn.Module) and _sharded(tower):  # agreed on before any of them
        most = torch.tensor(count, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        rounds = int(most)
    found = [call(number) for number in range(count)]
    # What is drawn after them (a decoder's dropout) is the same whatever the others have.
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        for _ in range(rounds - count):
            again = call(0)
            again = again if isinstance(again, torch.Tensor) else again.last_hidden_state
            nothing = nothing + 0 * again.sum()
    return found, nothing


def _sharded(tower: nn.Module) -> bool:
    """Whether its parameters, or those of a part, are brought together when it runs."""
    if any(isinstance(part, FSDPModule) and not stays_whole(part) for part in tower.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in tower.parameters())  # DeepSpeed's


def _cut(value: object, rows: list[int], shape: torch.Size, length: int) -> object:
    """Of a mask [clips, frames] what belongs to these clips."""
    if isinstance(value, torch.Tensor) and value.shape == shape[:2]:
        return value[rows, :length]
    return value


def together(parts: list[torch.Tensor]) -> torch.Tensor:
    """[clips, positions, ...] of all, padded with zeros; a mask of bools, which says what is
    padding, with ones."""
    longest = max(part.shape[1] for part in parts)
    fill = float(parts[0].dtype == torch.bool)
    return torch.cat(
        [F.pad(p, (0, 0) * (p.ndim - 2) + (0, longest - p.shape[1]), value=fill) for p in parts]
    )
