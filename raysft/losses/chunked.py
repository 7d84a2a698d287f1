"""Losses of tokens from a head's logits, the cross-entropy first, without holding all of them.

Stands in the step, inside the head: `models.supervised` lets the head return losses where it
would return logits. 8,192 tokens of a vocabulary of 150,000 are 4.9 GB of float32 logits, and three
times that with their softmax and gradient. Here the rows go through the head in chunks of
CHUNK_BYTES.

- The gradients of a chunk are computed along with its losses, so nothing is computed twice. Until
  the backward pass the head's gradient is held: as much as the head itself, if it trains.
- In float16, where gradients that are not scaled yet would vanish, and where what is trained is no
  sum over tokens, a chunk's logits are computed once more in the backward pass.
- All rows in one chunk: as if nothing was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

Forward = Callable[..., torch.Tensor]
TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of logits [M, V] and targets [M]: losses [M]."""

# Bytes of a chunk's float32 logits. On a GPU smaller products would leave it idle: 1,000 rows.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 600 * 2**20}


@dataclass
class Heard(BaseModelOutput):
    """What an encoder gives a decoder: last_hidden_state [R, positions, H], and what of it is no
    padding (None: all), which some models ask for."""

    attention_mask: torch.Tensor | None = None


def heard_width(net: PreTrainedModel) -> int:
    """H of what the encoder of `net` gives."""
    return net.get_encoder().config.hidden_size


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose float32 logits take `CHUNK_BYTES`; at least 1."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))


@torch.no_grad()
def head_is_last(net: PreTrainedModel, head: nn.Module) -> tuple[int, bool]:
    """Size of the vocabulary, and whether the model's logits are what its head returns.

    Models that scale or cap their logits need all of them. Proven on four tokens, bit by bit; in
    float32, to which some models cast.
    """
    audio = getattr(net.config, "audio_token_id", None)
    device = net.get_input_embeddings().weight.device
    tokens = torch.tensor([[i for i in range(5) if i != audio][:4]], device=device)
    inputs: dict[str, object] = {"input_ids": tokens}
    if net.config.is_encoder_decoder:
        heard = Heard(torch.zeros(1, 1, heard_width(net), device=device))
        inputs = {"encoder_outputs": heard, "decoder_input_ids": tokens}
    seen: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _module, _args, out: seen.append(out))
    training = net.training
    net.eval()
    try:
        logits = net(**inputs, use_cache=False).logits
    finally:
        hook.remove()
        net.train(training)
    same = len(seen) == 1 and torch.equal(seen[0].float(), logits.float())
    return logits.shape[-1], same and bool(logits.any())  # zeros would stay zeros


def in_one_call(head: nn.Module) -> bool:
    """Whether the head has to see all rows at once: under zero3 its parts (rows of new tokens) are
    gathered by a collective at every call, and workers differ in how many chunks they have."""
    return any(hasattr(p, "ds_id") for part in head.children() for p in part.parameters())


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Float32 losses [M] of logits [M, V]; targets int64 [M]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


class OfTokens(Protocol):
    """Losses of tokens: `Kinds`, or what `learns.Learns` says of tokens that have a context."""

    @property
    def rows(self) -> int:
        """Numbers of a token."""

    @property
    def by_token(self) -> bool:
        """Whether the total of all tokens is the sum of those of any parts of them."""

    def of_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Float32 [rows, M] of logits [M, V]."""

    def total(self, losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """What is trained of [rows, M]. weights: float32 [M] or [M, C], of each token."""


class Kinds(NamedTuple):
    """The losses of a token: the cross-entropy, and others by (function, weight)."""

    more: tuple[tuple[TokenLoss, float], ...] = ()

    @property
    def rows(self) -> int:
        """See `OfTokens`."""
        return 1 + len(self.more)

    @property
    def by_token(self) -> bool:
        """See `OfTokens`."""
        return True

    def of_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Float32 [1 + more, M] of logits [M, V]."""
        logits = logits.float()
        return torch.stack(
            [cross_entropy(logits, targets), *(found(logits, targets) for found, _ in self.more)]
        )

    def total(self, losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """What is trained: all losses [1 + more, M], each times its kind's weight and its token's
        (float32 [M]; None: all are 1)."""
        first, *rest = (weighted_sum(each, weights) for each in losses)
        for found, (_, weight) in zip(rest, self.more, strict=True):
            first = first + weight * found
        return first


CROSS_ENTROPY_ALONE = Kinds()


def weighted_sum(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Sum of losses [M], each times its weight (float32 [M]; None: all are 1)."""
    return losses.sum() if weights is None else (losses * weights).sum()


def _of_hidden(
    kinds: OfTokens, forward: Forward, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    return kinds.of_logits(forward(hidden), targets)


def chunked_losses(
    head: nn.Module,
    forward: Forward,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    rows: int,
    weights: torch.Tensor | None = None,
    kinds: OfTokens = CROSS_ENTROPY_ALONE,
) -> torch.Tensor:
    """Of hidden [M, H]: [kinds.rows, M + 1], the losses without a gradient and, last in the
    first row, what is trained, with one.

    rows: how many have logits at a time. forward: what the head computes, without its hooks, whose
    work is done when this is called. weights: of each token in the sum, float32 [M]; None: 1; or
    its context [M, C], where kinds asks for one.
    """
    parts = list(zip(hidden.split(rows), targets.split(rows), strict=True))
    if not torch.is_grad_enabled():
        losses = torch.cat([_of_hidden(kinds, forward, *part) for part in parts], 1)
        total = kinds.total(losses, weights)
    elif kinds.by_token and not _in_float16(hidden):
        trained = [p for p in head.parameters() if p.requires_grad]
        losses, total = _Ahead.apply(kinds, forward, rows, targets, weights, hidden, *trained)
    else:
        losses = torch.cat(
            [checkpoint(_of_hidden, kinds, forward, *p, use_reentrant=False) for p in parts], 1
        )
        total = kinds.total(losses, weights)
    last = torch.cat([total.unsqueeze(0), losses.new_zeros(kinds.rows - 1)])
    return torch.cat([losses.detach(), last.unsqueeze(1)], 1)


class _Ahead(torch.autograd.Function):
    """Losses [kinds, M], what is trained of them, and along with it its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        kinds: OfTokens,
        forward: Forward,
        rows: int,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        hidden: torch.Tensor,
        *trained: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses, by_hidden = [], []
        by_trained: list[torch.Tensor] = []
        parts = hidden.split(rows)
        each = weights.split(rows) if weights is not None else (None,) * len(parts)
        for part, wanted, weight in zip(parts, targets.split(rows), each, strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                found = _of_hidden(kinds, forward, leaf, wanted)
                total = kinds.total(found, weight)
            first, *rest = torch.autograd.grad(total, (leaf, *trained))
            losses.append(found.detach())
            by_hidden.append(first)
            if by_trained:
                torch._foreach_add_(by_trained, rest)
            else:
                by_trained = rest
        ctx.save_for_backward(torch.cat(by_hidden), *by_trained)
        joined = torch.cat(losses, 1)
        ctx.mark_non_differentiable(joined)
        return joined, kinds.total(joined, weights)

    @staticmethod
    def backward(
        ctx: Any, _: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        # In place, for the head's gradient is large. A second backward pass would be refused.
        return (None, None, None, None, None, *(g.mul_(factor) for g in ctx.saved_tensors))


def _in_float16(hidden: torch.Tensor) -> bool:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.float16
    return hidden.dtype == torch.float16
