"""The interface of a strategy: it holds the wrapped model and its optimizer, and their state.

A strategy's state names parameters as the plain model does, whole or as DTensors, so a checkpoint
can be loaded by another strategy or at another world size. Optimizer state is by parameter too;
rates, decays and the like are not in it, for they follow from the config.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from raysft.json_types import JsonObject

State = dict[str, Any]


@dataclass(frozen=True)
class Stepped:
    """What became of a step. norm: of the whole gradient, before clipping. skipped: it was NaN or
    infinite, and no weight has changed."""

    norm: float
    skipped: bool


class Strategy(Protocol):
    """What the training loop asks of a strategy. Every method is a collective but `autocast`."""

    module: nn.Module

    def autocast(self) -> AbstractContextManager[object]:
        """Around a forward pass: computes in `train.precision`."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        """Around the forward and backward of one turn; gradients meet in the `last` one only."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`; workers' gradients are averaged."""
        ...

    def step(self, rate: float, before_zero: Callable[[], None] = lambda: None) -> Stepped:
        """Clip as `optim.clip` says, move the weights, clear the gradients.

        rate: share of the peak learning rate. before_zero: called after a step that was not
        skipped, while its gradients are still there.
        """
        ...

    def drop(self) -> None:
        """Forget the gradient of a step in which nothing was supervised."""
        ...

    def whole(self) -> AbstractContextManager[object]:
        """Around evaluation: submodules may be called on their own, not through `module`.

        Gives True where what is sharded in training is whole: no pass is a collective then."""
        ...

    def state(self) -> State:
        """{"model": {name: tensor}, "optim": {name: {key: tensor}}}: what a checkpoint holds.

        With adapters (`peft.method`) only what trains. A worker gives what it is to write.
        """
        ...

    def facts(self) -> JsonObject:
        """The rest of the state, as JSON."""
        ...

    def load(self, read: Callable[[State], None], weights_only: bool = False) -> None:
        """Take over a saved state. read: fills the tensors of a (part of a) `state` in place.

        weights_only: leave the optimizer as it is.
        """
        ...

    def load_facts(self, facts: JsonObject) -> None:
        """The inverse of `facts`."""
        ...


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that receive gradients."""
    return [p for p in module.parameters() if p.requires_grad]
