"""By what experts compute fastest, tried on a run's own shapes: `model.moe.experts: auto`.

Each candidate does the forward and backward pass of one layer's experts a few times, for random
tokens that go to all experts alike, with random matrices of the layer's shapes in the run's dtype,
on the worker's device. Costs as much memory as that layer with its gradients and activations, and
for each candidate the time of four such passes, or of one that takes over a second.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from raysft.config.moe import Backend
from raysft.errors import UserError
from raysft.models import experts
from raysft.models.experts import BACKENDS, CHOSEN, WHOLE, why_not
from raysft.models.loading import line_of, seeded
from raysft.parallel.blocks import experts_of

AGAIN = 3  # timed passes, after one that warms up
ENOUGH_S = 1.0  # a pass that takes longer is not done again


@dataclass
class Tried:
    """ms: candidate -> what it takes. failed: others, and what they said: a kernel that cannot be
    fetched, one built for another device, memory that does not suffice."""

    ms: dict[Backend, float] = field(default_factory=dict)
    failed: dict[Backend, str] = field(default_factory=dict)


def candidates(net: nn.Module, device: torch.device, dtype: torch.dtype) -> list[Backend]:
    """By what the experts of `net` can compute there, in that dtype."""
    updated = any(hasattr(module, "lora") for _, module in experts_of(net))
    able = [backend for backend in BACKENDS if why_not(backend, device, dtype) is None]
    return [backend for backend in able if not (updated and backend in WHOLE)]


def milliseconds(net: nn.Module, device: torch.device, dtype: torch.dtype, tokens: int) -> Tried:
    """The time that so many tokens take through the experts of a layer and back, by candidate.

    Raises UserError where none of them works.
    """
    own: Any = experts_of(net)[0][1]
    with seeded(0):
        layer = _alike(own, device, dtype)
        count, *widths = own.down_proj.shape
        rows = torch.randn(tokens, widths[own.is_transposed]).to(device, dtype).requires_grad_()
        counts = (getattr(own.config, name, None) for name in CHOSEN)
        chosen = next((number for number in counts if isinstance(number, int)), 1)
        weights, ids = (found.to(device) for found in torch.rand(tokens, count).topk(chosen))
    tried = Tried()
    for backend in candidates(net, device, dtype):
        experts.use(layer, backend)
        try:
            tried.ms[backend] = round(_seconds(layer, rows, ids, weights) * 1e3, 3)
        except (ImportError, OSError, RuntimeError) as error:
            tried.failed[backend] = line_of(error)
        rows.grad = None
        layer.zero_grad()
    if not tried.ms:
        said = "; ".join(f"{backend}: {line}" for backend, line in tried.failed.items())
        raise UserError(
            f"model.moe.experts: auto: nothing that multiplies by experts works here ({said}); "
            "with fewer data.tokens_per_batch it takes less memory"
        )
    return tried


def _seconds(
    layer: nn.Module, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> float:
    taken: list[float] = []
    while len(taken) <= AGAIN:
        _wait(rows.device)
        before = time.perf_counter()
        out = layer(rows, ids, weights)
        out.backward(out.detach())
        _wait(rows.device)
        taken.append(time.perf_counter() - before)
        layer.zero_grad()
        if taken[-1] > ENOUGH_S:
            break
    return min(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _alike(own: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module of experts like `own`, with random parameters and a config of its own."""
    drawn: dict[int, object] = {}
    for parameter in own.parameters():
        filled = torch.empty(parameter.shape, device=device, dtype=dtype).normal_(std=0.02)
        drawn[id(parameter)] = nn.Parameter(filled, parameter.requires_grad)
    return copy.deepcopy(own, drawn)
