"""GRPO: groups of sampled answers, each held against the others of its group.

A = (r - mean) / (std + 1e-4) over a group, std unbiased (Shao et al., 2024); of each token
-min(ratio A, clipped ratio A) + beta KL, with KL = exp(ref - lp) - (ref - lp) - 1, which is never
negative and estimates that of the model from its reference without bias (Schulman, 2020).

What divides the sum decides how long answers count: see `Policy.loss`. Divisors are counts over all
workers (`losses.term`), so that the loss does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from raysft.losses.learns import log_probabilities
from raysft.losses.term import Term

Normalisation = Literal["grpo", "dr_grpo", "dapo"]
EPS = 1e-4  # beside the deviation of a group
POLICY = "policy"  # the term that trains
ADVANTAGE, WEIGHT, SHARE, OLD, REFERENCE = range(5)
"""Columns of a token's context: advantage of its answer; its weight in the sum; its share of what
divides that; its log-probability when it was sampled, and by the reference."""


def advantages(rewards: torch.Tensor, group: int, scaled: bool = True) -> torch.Tensor:
    """[N] of rewards [N], those of a group side by side. scaled: by the group's deviation."""
    groups = rewards.view(len(rewards) // group, group)
    found = groups - groups.mean(1, keepdim=True)
    if scaled:
        found = found / (groups.std(1, keepdim=True) + EPS)
    return found.flatten()


def equal(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """Bool [N / group]: groups whose answers all earn the same, from which nothing is learnt."""
    groups = rewards.view(len(rewards) // group, group)
    return (groups == groups[:, :1]).all(1)


def divergence(logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL of each token, from both log-probabilities."""
    ahead = reference - logps
    return ahead.exp() - ahead - 1


def weights(tokens: int, longest: int, loss: Normalisation) -> tuple[float, float]:
    """Weight of each token of an answer of so many, and its share of what divides the sum.

    longest: that an answer may have.
    """
    share = 1 / tokens
    return {"grpo": (share, share), "dr_grpo": (1 / longest, share), "dapo": (1.0, 1.0)}[loss]


@dataclass(frozen=True)
class Policy:
    """What sampled tokens teach; see `learns.Learns`.

    loss: what is divided by what, over all answers of a step. grpo: the mean over answers of the
        means over their tokens; dr_grpo: the sum over tokens by answers times the most tokens that
        one may have (Liu et al., 2025); dapo: the mean over tokens (Yu et al., 2025).
    temperature: that answers are sampled at. beta: weight of the KL; 0: there is no reference.
    low, high: how far the ratio may fall below, and rise above, 1. again: a rollout is learnt more
    than once, so that tokens have an old log-probability; else it is the one at hand.
    """

    columns: ClassVar[int] = 5
    rows: ClassVar[int] = 1
    by_token: ClassVar[bool] = True

    loss: Normalisation = "grpo"
    temperature: float = 1.0
    beta: float = 0.0
    low: float = 0.2
    high: float = 0.2
    again: bool = False

    @property
    def counted(self) -> str:
        """The count that divides: see `Turn.counts`."""
        return "supervised" if self.loss == "dapo" else "answers"

    def of_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """See `Learns`."""
        return -log_probabilities(logits, targets, self.temperature).unsqueeze(0)

    def total(self, losses: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """See `Learns`."""
        if context is None:  # only log-probabilities are asked for
            return losses.sum()
        return (self.each(-losses[0], context) * context[:, WEIGHT]).sum()

    def weighted(self, context: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Learns`."""
        columns = list(context.unbind(1))
        columns[WEIGHT] = columns[WEIGHT] * weights
        return torch.stack(columns, 1)

    def each(self, logps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Loss [M] of each token, of log-probabilities [M] and context [M, 5]."""
        advantage, ratio = context[:, ADVANTAGE], self._ratio(logps, context)
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        found = -torch.minimum(ratio * advantage, clipped * advantage)
        if self.beta:
            found = found + self.beta * divergence(logps, context[:, REFERENCE])
        return found

    def _ratio(self, logps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        old = context[:, OLD] if self.again else logps.detach()
        return (logps - old).exp()

    def clipped(self, logps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Float32 [M]: 1 where the clipped ratio is the one that counts: nothing is learnt."""
        advantage, ratio = context[:, ADVANTAGE], self._ratio(logps, context)
        below = (ratio < 1 - self.low) & (advantage < 0)
        return (below | ((ratio > 1 + self.high) & (advantage > 0))).float()

    def terms(
        self,
        losses: torch.Tensor,
        total: torch.Tensor,
        context: torch.Tensor,
        chosen: torch.Tensor,
        names: Sequence[str],
        trains: bool,
    ) -> list[Term]:
        """See `Learns`: what is trained; beside it the KL and the share of clipped tokens."""
        logps, share = -losses[0].detach(), context[:, SHARE]
        real = (share > 0).float()  # rows of one shape are filled up

        def term(name: str, values: torch.Tensor, counts: torch.Tensor) -> Term:
            sums, of_tasks = (chosen * values).sum(1), (chosen * counts).sum(1)
            by_task = {task: (sums[i], of_tasks[i]) for i, task in enumerate(names)}
            return Term(name, values.sum(), counts.sum(), by_task)

        first = term(POLICY, self.each(logps, context) * context[:, WEIGHT], share)
        found = [first._replace(trained=total, counted=self.counted)]
        aside = {"clipped": self.clipped(logps, context)} if self.again else {}
        if self.beta:
            aside["kl"] = divergence(logps, context[:, REFERENCE])
        for name, values in aside.items():
            found.append(term(name, values * real, real)._replace(aside=True))
        return found
