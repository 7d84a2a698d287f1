"""One optimizer step: K micro-batches, one from each lane, whatever the number of workers.

The loss of a step is the sum over all its supervised tokens, each times its task's weight
(`train.task_weights`), divided by their global count. Workers average gradients, so each scales its
sum by (workers / global tokens): the result does not depend on how many workers share the lanes,
nor on how tokens fall to them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from raysft.data.example import MicroBatch
from raysft.parallel import Strategy, World


@dataclass(slots=True)
class Turn:
    """One forward and backward of one worker: a micro-batch laid out for the model."""

    lane: int
    batch: dict[str, Any]
    supervised: int
    positions: int  # computed by the model, padding included
    tokens: int  # real ones among them
    squares: float = 0.0  # of the documents' lengths: pairs of positions that attention may see
    clips: int = 0


@dataclass(slots=True)
class StepBatch:
    """What one worker runs in one step. `turns` has the same length on every worker."""

    epoch: int
    step: int
    after: dict[str, Any]  # the cursor once this step is done
    turns: list[Turn]
    micro_batches: list[MicroBatch] = field(default_factory=list)


def lane_seed(seed: int, epoch: int, step: int, lane: int) -> int:
    """The seed of everything random in one micro-batch: never a function of rank."""
    digest = hashlib.blake2b(f"{seed},{epoch},{step},{lane}".encode(), digest_size=8).digest()
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
    global_tokens: float,
    seed: int,
) -> torch.Tensor:
    """Accumulate the gradient of the step's loss; returns float64 [2, 1 + tasks] of this worker.

    Row 0 holds summed losses, row 1 supervised tokens: in all (losses times their tasks' weights),
    then by task (as they are). A penalty on the weights counts once a step, not once a token, and
    is in no reported loss; nor is the balance loss of a mixture's routers, of which each
    micro-batch has its share of supervised tokens.
    """
    sums = torch.zeros(2, 1 + len(tasks), dtype=torch.float64, device=world.device)
    scale = world.size / max(1.0, global_tokens)
    for number, turn in enumerate(batch.turns):
        seed_turn(lane_seed(seed, batch.epoch, batch.step, turn.lane), world.device)
        with strategy.accumulate(last=number == len(batch.turns) - 1):
            with strategy.autocast():
                losses = strategy.module(to_device(turn.batch, world.device))
            loss = losses.sum * scale
            if losses.penalty is not None:
                loss = loss + losses.penalty / len(batch.turns)
            strategy.backward(loss)
        sums[0, 0] += losses.sum.detach()
        if losses.balance is not None:
            sums[0, 0] -= losses.balance
        sums[1, 0] += losses.count
        for column, task in enumerate(tasks, start=1):
            if task in losses.by_task:
                loss, count = losses.by_task[task]
                sums[0, column] += loss
                sums[1, column] += count
    return sums


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch, except `documents`, whose lengths the CPU needs to know."""
    if device.type == "cpu":
        return batch
    return {
        key: value if key == "documents" else value.to(device, non_blocking=True)
        for key, value in batch.items()
    }
