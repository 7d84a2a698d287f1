"""What a batch teaches beside right answers: losses that look at more than a token and its logits.

Stands between `models.supervised`, which has log-probabilities, and the formulas (`grpo`, `dpo`).
Of each supervised token a batch then has a row of numbers, its context [M, C]: what was known of it
before this forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from raysft.losses.term import Term


class Learns(Protocol):
    """Losses of tokens that have a context.

    columns: C. rows: numbers of a token that `of_logits` gives. by_token: whether `total` of all
    tokens is the sum of those of any parts of them.
    """

    @property
    def columns(self) -> int:
        """As above."""

    @property
    def rows(self) -> int:
        """As above."""

    @property
    def by_token(self) -> bool:
        """As above."""

    def of_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Float32 [rows, M] of logits [M, V]: first the negative log-probability of each target."""
        ...

    def total(self, losses: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """What is trained of the rows [rows, M] and context [M, C], with their graph."""
        ...

    def weighted(self, context: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The context [M, C] of tokens that weigh so much more [M] in what is trained."""
        ...

    def terms(
        self,
        losses: torch.Tensor,
        total: torch.Tensor,
        context: torch.Tensor,
        chosen: torch.Tensor,
        names: Sequence[str],
        trains: bool,
    ) -> list[Term]:
        """Terms of a micro-batch, in training that which trains `total` first. chosen: float32
        [tasks, M], 1 where a token is of a task; names: of the tasks. trains: else they are for
        figures of an evaluation."""
        ...


def log_probabilities(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Float32 [M]: of targets [M] under the softmax of logits [M, V] / temperature."""
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
