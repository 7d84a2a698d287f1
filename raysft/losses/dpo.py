"""DPO: of two answers the chosen one is to become likelier, against a reference, than the other.

With h = (log pi(c) - log ref(c)) - (log pi(r) - log ref(r)), of a chosen answer c and a rejected r,
the loss of a pair is -log sigmoid(beta h) (Rafailov et al., 2023, eq. 7); smoothed by e, as if so
many pairs were labelled the wrong way round, -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
(cDPO; Mitchell, 2023). IPO: (h - 1 / (2 beta))^2 (Azar et al., 2023, eq. 17), with means over an
answer's tokens in place of log-probabilities, so that h does not grow with their number. Sums are
divided by the pairs of all workers (`losses.term`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch.nn.functional import logsigmoid

from raysft.losses.learns import log_probabilities
from raysft.losses.term import CROSS_ENTROPY, Term
from raysft.scorers.preferences import MARGIN, PREFERRED

Loss = Literal["sigmoid", "ipo"]
PREFERENCE = "preference"  # the term that trains
PAIRS = "pairs"  # the count that divides it: see `Turn.counts`
PAIR, SIDE, LENGTH, WEIGHT, REFERENCE = range(5)
"""Columns of a token's context: number of its pair in the batch; 1 where its answer is the chosen,
-1 where the rejected, 0 where it is of none; tokens of its answer; its weight; its log-probability
by the reference."""
CHOSEN, REJECTED = 1.0, -1.0


class Pairs(NamedTuple):
    """Numbers [P] of the pairs of a batch, of log-probabilities of whole answers. whole: 1 where
    both answers are there. members [P, M]: 1 where a token is of a pair."""

    chosen: torch.Tensor  # by the model
    rejected: torch.Tensor
    chosen_reference: torch.Tensor
    rejected_reference: torch.Tensor
    weight: torch.Tensor
    whole: torch.Tensor
    members: torch.Tensor

    @property
    def ahead(self) -> torch.Tensor:
        """h."""
        own = self.chosen - self.chosen_reference
        return own - (self.rejected - self.rejected_reference)


@dataclass(frozen=True)
class Preference:
    """What pairs of answers teach; see `learns.Learns`.

    beta: how strongly the model is held to its reference. smoothing: share of pairs that are taken
    to be labelled the wrong way round (loss: sigmoid). sft: weight, in the loss of a pair, of the
    mean cross-entropy of the chosen answer's tokens.
    """

    columns: ClassVar[int] = 5
    rows: ClassVar[int] = 1
    by_token: ClassVar[bool] = False

    beta: float = 0.1
    loss: Loss = "sigmoid"
    smoothing: float = 0.0
    sft: float = 0.0

    def of_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """See `Learns`."""
        return -log_probabilities(logits, targets).unsqueeze(0)

    def total(self, losses: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """See `Learns`."""
        if context is None:  # only log-probabilities are asked for
            return losses.sum()
        pairs = _pairs(-losses[0], context, means=self.loss == "ipo")
        return (self._of_pairs(pairs, losses[0], context) * pairs.weight * pairs.whole).sum()

    def _of_pairs(self, pairs: Pairs, losses: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Loss [P] of each pair, of those [M] of tokens."""
        found = self.each(pairs.ahead)
        if not self.sft:
            return found
        share = (context[:, SIDE] == CHOSEN) / context[:, LENGTH].clamp(min=1)
        return found + self.sft * (pairs.members * share * losses).sum(1)

    def weighted(self, context: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Learns`."""
        columns = list(context.unbind(1))
        columns[WEIGHT] = columns[WEIGHT] * weights
        return torch.stack(columns, 1)

    def each(self, ahead: torch.Tensor) -> torch.Tensor:
        """What h [P] costs each pair."""
        if self.loss == "ipo":
            return (ahead - 1 / (2 * self.beta)).square()
        right, wrong = logsigmoid(self.beta * ahead), logsigmoid(-self.beta * ahead)
        return -(1 - self.smoothing) * right - self.smoothing * wrong

    def terms(
        self,
        losses: torch.Tensor,
        total: torch.Tensor,
        context: torch.Tensor,
        chosen: torch.Tensor,
        names: Sequence[str],
        trains: bool,
    ) -> list[Term]:
        """See `Learns`. In training what is trained, and beside it what is watched of it, with
        beta (log pi - log ref) the reward of an answer; in evaluation, where nobody has asked the
        reference, the cross-entropy of chosen answers, and how often those are the likelier."""
        logps = -losses[0].detach()
        pairs = _pairs(logps, context, means=self.loss == "ipo")
        # A pair is of the task that its tokens are of: of one task are all, or none.
        tasks = [_most(pairs.members * own) for own in chosen]

        def term(name: str, values: torch.Tensor, of: torch.Tensor) -> Term:
            by_task = {
                task: ((own * values * of).sum(), (own * of).sum())
                for task, own in zip(names, tasks, strict=True)
            }
            total = (values * of).sum()
            return Term(name, total, of.sum(), by_task, None, PAIRS, float(trains), aside=True)

        if not trains:
            likelier = pairs.chosen > pairs.rejected
            ahead = pairs.chosen - pairs.rejected
            return [
                _said(losses[0], context, chosen, names),
                term(PREFERRED, likelier.float(), pairs.whole),
                term(MARGIN, ahead, pairs.whole),
            ]
        own = self.beta * (pairs.chosen - pairs.chosen_reference)
        other = self.beta * (pairs.rejected - pairs.rejected_reference)
        first = term(PREFERENCE, self._of_pairs(pairs, -logps, context), pairs.whole)
        found = [first._replace(trained=total, aside=False)]
        if self.sft:
            found.append(_said(losses[0], context, chosen, names)._replace(aside=True))
        watched = {
            "reward_accuracy": (pairs.ahead > 0).float(),
            "reward_margin": own - other,
            "reward_chosen": own,
            "reward_rejected": other,
            "logp_chosen": pairs.chosen,
            "logp_rejected": pairs.rejected,
        }
        return [*found, *(term(name, values, pairs.whole) for name, values in watched.items())]


def _said(
    losses: torch.Tensor, context: torch.Tensor, chosen: torch.Tensor, names: Sequence[str]
) -> Term:
    """The cross-entropy of the tokens of chosen answers."""
    real = (context[:, SIDE] == CHOSEN).float()
    own = losses.detach()
    sums, counts = (chosen * own * real).sum(1), (chosen * real).sum(1)
    by_task = {task: (sums[i], counts[i]) for i, task in enumerate(names)}
    return Term(CROSS_ENTROPY, (own * real).sum(), real.sum(), by_task)


def _pairs(logps: torch.Tensor, context: torch.Tensor, means: bool) -> Pairs:
    """means: over the tokens of an answer, not sums."""
    each = context[:, LENGTH].clamp(min=1) if means else 1.0
    own, reference = logps / each, context[:, REFERENCE] / each
    members, side = _members(context), context[:, SIDE]
    chosen, rejected = members * (side == CHOSEN), members * (side == REJECTED)
    return Pairs(
        (chosen * own).sum(1),
        (rejected * own).sum(1),
        (chosen * reference).sum(1),
        (rejected * reference).sum(1),
        _most(members * context[:, WEIGHT]),
        _most(chosen) * _most(rejected),
        members,
    )


def _most(held: torch.Tensor) -> torch.Tensor:
    """The largest [P] of values >= 0 [P, M]."""
    return held.amax(1) if held.numel() else held.sum(1)


def _members(context: torch.Tensor) -> torch.Tensor:
    """Float32 [P, M]: 1 where a token is of a pair. By comparison, not by scattered additions: the
    same bits every time on a GPU too. Asks the device how many pairs there are."""
    pair = context[:, PAIR]
    number = int(pair.max()) + 1 if len(pair) else 0
    numbers = torch.arange(number, device=pair.device, dtype=pair.dtype).unsqueeze(1)
    return ((pair == numbers) & (context[:, SIDE] != 0)).to(context.dtype)
