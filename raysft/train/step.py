"""One optimizer step: K micro-batches, one from each lane, whatever the number of workers.

The loss of a step is a sum of terms (`losses.term`), each divided by the global count of what it is
a sum over: the cross-entropy, in which a token counts as its task does (`train.task_weights`), by
all supervised tokens. Workers average gradients, so each scales its sum by (workers / global
count): the result does not depend on how many workers share the lanes, nor on how tokens fall to
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from raysft.data.example import MicroBatch
from raysft.json_types import JsonObject
from raysft.losses.term import Sums, Term
from raysft.parallel import Strategy, World


@dataclass(slots=True)
class Turn:
    """One forward and backward of one worker: a micro-batch laid out for the model.

    counts: what it holds, by name, the same names in every turn: tokens; positions computed, with
    padding; examples, audio_seconds, quarantined; and what `SpeechModel.counts` adds. The terms of
    the loss are divided by some of them. part: which of several turns of its lane it is.
    """

    lane: int
    batch: dict[str, Any]
    counts: dict[str, float]
    part: int = 0


@dataclass(slots=True)
class StepBatch:
    """What one worker runs in one step. `turns` has the same length on every worker. told: by lane,
    what the ledger is told of it beside its examples."""

    epoch: int
    step: int
    after: JsonObject  # the cursor once this step is done
    turns: list[Turn]
    micro_batches: list[MicroBatch] = field(default_factory=list)
    told: dict[int, JsonObject] = field(default_factory=dict)

    def counts(self) -> dict[str, float]:
        """Of all turns, by name."""
        first, *rest = (turn.counts for turn in self.turns)
        return {name: sum((each[name] for each in rest), first[name]) for name in first}


def lane_seed(seed: int, epoch: int, step: int, lane: int, *more: int) -> int:
    """The seed of everything random in one micro-batch: never a function of rank. more: which of
    its parts, and which time, where it is not learnt whole and once."""
    text = ",".join(map(str, (seed, epoch, step, lane, *(more if any(more) else ()))))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_turn(seed: int, device: torch.device) -> None:
    """Seed the generators a turn draws from: the CPU's and its device's.

    Not torch.manual_seed: without a GPU it keeps a stack trace at every call (2 ms, never freed)
    in case CUDA should still be used.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def forward_backward(
    strategy: Strategy,
    world: World,
    batch: StepBatch,
    tasks: list[str],
    counts: Mapping[str, float],
    seed: int,
    begins: Callable[[int], None] = lambda turn: None,
    update: int = 0,
) -> Sums:
    """Accumulate the gradient of the step's loss; returns the terms of this worker's micro-batches.

    counts: of this step over all workers, by name. begins: called with the number of each turn.
    update: how often the weights have moved by this batch already.
    """
    sums: Sums | None = None
    for number, turn in enumerate(batch.turns):
        begins(number)
        place = (batch.epoch, batch.step, turn.lane, turn.part, update)
        seed_turn(lane_seed(seed, *place), world.device)
        with strategy.accumulate(last=number == len(batch.turns) - 1):
            with strategy.autocast():
                terms: list[Term] = strategy.module(to_device(turn.batch, world.device))
            strategy.backward(_loss(terms, counts, world.size, len(batch.turns)))
        if sums is None:
            sums = Sums.zeros(terms, len(tasks), world.device)
        sums.add(terms, tasks)
    assert sums is not None  # every worker has a turn
    return sums


def _loss(terms: list[Term], counts: Mapping[str, float], workers: int, turns: int) -> torch.Tensor:
    """What a turn differentiates; gradients are averaged over `workers`, and added over `turns`."""
    loss: torch.Tensor | None = None
    for term in terms:
        if term.trained is None:
            continue
        if term.counted is None:
            found = term.trained / turns
        else:
            found = term.trained * (workers / max(1.0, counts[term.counted]))
        if term.weight != 1.0:
            found = found * term.weight
        loss = found if loss is None else loss + found
    assert loss is not None, "a forward without a term to train"
    return loss


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch, except `documents`, whose lengths the CPU needs to know."""
    if device.type == "cpu":
        return batch
    return {
        key: value if key == "documents" else value.to(device, non_blocking=True)
        for key, value in batch.items()
    }
