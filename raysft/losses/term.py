"""A term of the loss: a sum over a micro-batch, and the count over all workers that divides it.

The loss of a step is the sum over its terms, each its `weight` times its sum over all micro-batches
divided by their count. So it depends neither on how many workers share the lanes nor on how
examples fall to them, whatever a term is counted in: tokens, frames of speech, answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

CROSS_ENTROPY = "cross_entropy"  # the term every language model has


class Term(NamedTuple):
    """One term of one micro-batch. A tuple, so that FSDP2, DDP and DeepSpeed find its tensors.

    name: as metrics call it. sum: float32 [], detached, over what it counts. count: of that [].
    by_task: of every task the same two; without the weights that tasks may have in `sum`.
    trained: what is differentiated, with a graph to every parameter it uses, in every micro-batch;
        None: this sum is part of another term's `trained`.
    counted: the name among `Turn.counts` of what it is divided by, over all workers; None: it is
        of the weights and not of the data, and counts once a step.
    weight: in the loss. reported: whether `loss` and metrics hold it; aside: metrics do, `loss`
        does not: it is not of what a model says.
    """

    name: str
    sum: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # hides that of tuples
    by_task: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = {}
    trained: torch.Tensor | None = None
    counted: str | None = "supervised"
    weight: float = 1.0
    reported: bool = True
    aside: bool = False


def of_rows(
    name: str,
    sums: torch.Tensor,
    counts: torch.Tensor,
    tasks: torch.Tensor,
    names: Sequence[str],
    weights: Mapping[str, float],
    counted: str,
    weight: float = 1.0,
) -> Term:
    """The term of rows that each have a sum of their own, with its graph, and a count of it.

    sums, counts: [R]. tasks: int64 [R], numbers in `names`; -1: nobody's, which counts nothing.
    weights: of tasks in what is trained, 1 where none is given. The rest, as in `Term`.
    """
    trained = sums
    if weights:
        by_name = [float(weights.get(task, 1.0)) for task in names]
        trained = sums * torch.tensor([*by_name, 0.0], device=sums.device)[tasks]
    numbers = torch.arange(len(names), device=sums.device).unsqueeze(1)
    chosen = (tasks.unsqueeze(0) == numbers).to(torch.float32)
    own, of_tasks, total = chosen * sums.detach(), chosen * counts, trained.sum()
    by_task = {task: (own[i].sum(), of_tasks[i].sum()) for i, task in enumerate(names)}
    return Term(name, total.detach(), counts.sum(), by_task, total, counted, weight)


@dataclass
class Sums:
    """Reported terms, summed. values: float64 [terms, 2, 1 + tasks]: sums, and the counts behind
    them; in all, then by task. weights: of the terms in the loss."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    values: torch.Tensor

    @classmethod
    def zeros(cls, terms: Sequence[Term], tasks: int, device: torch.device) -> Sums:
        """Of the reported among `terms`, nothing yet."""
        own = [term for term in terms if term.reported]
        values = torch.zeros(len(own), 2, 1 + tasks, dtype=torch.float64, device=device)
        weights = tuple(0.0 if t.aside else t.weight for t in own)
        return cls(tuple(t.name for t in own), weights, values)

    def add(self, terms: Sequence[Term], tasks: Sequence[str]) -> None:
        """Add the terms of a micro-batch; tasks: of the columns."""
        for place, term in enumerate(term for term in terms if term.reported):
            values = self.values[place]
            values[0, 0] += term.sum
            values[1, 0] += term.count
            for column, task in enumerate(tasks, start=1):
                if task in term.by_task:
                    found, count = term.by_task[task]
                    values[0, column] += found
                    values[1, column] += count

    def means(self, tasks: Sequence[str]) -> dict[str, float]:
        """The loss, in all and by task for tasks that were there; each term where there are more
        than one."""
        values = self.values.cpu()
        means = values[:, 0] / values[:, 1].clamp(min=1)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        totals = (weights.unsqueeze(1) * means).sum(0).tolist()  # of one term: its very bits
        found = {"loss": totals[0]}
        there = (values[:, 1] > 0).any(0).tolist()
        for column, task in enumerate(tasks, start=1):
            if there[column]:
                found[f"loss/{task}"] = totals[column]
        if len(self.names) > 1:
            found |= {f"term/{n}": mean for n, mean in zip(self.names, means[:, 0].tolist())}
        return found
