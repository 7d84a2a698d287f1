"""Log-probabilities of supervised tokens, by the model as it is or by its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from raysft.models.layout import CONTEXT
from raysft.models.supervised import Supervised
from raysft.objectives.frozen import Frozen
from raysft.parallel import Strategy, World
from raysft.train.step import Turn, to_device


def with_context(turn: Turn, columns: int) -> Turn:
    """A turn whose tokens have a context, be there none of them: all have the same terms then."""
    if CONTEXT not in turn.batch:
        rows = len(turn.batch["keep"])
        turn.batch[CONTEXT] = torch.zeros(rows, columns, dtype=torch.int32)
    return turn


@torch.no_grad()
def tell(
    turns: Sequence[Turn],
    column: int,
    strategy: Strategy,
    supervised: Supervised,
    world: World,
    reference: Frozen | None,
    begins: Callable[[int], None],
) -> None:
    """Write each token's log-probability into `column` of its context, without dropout. A
    collective, of as many turns on every worker. reference: whose; None: the model's as it is."""
    module, training = strategy.module, strategy.module.training
    module.eval()
    supervised.telling = True
    swapped = nullcontext() if reference is None else reference.in_place()
    try:
        with swapped, strategy.whole():
            for number, turn in enumerate(turns):
                begins(number)
                with strategy.autocast():
                    (found,) = module(to_device(turn.batch, world.device))
                context = turn.batch[CONTEXT].view(torch.float32)
                context[:, column] = -found.sum.float().cpu()
    finally:
        supervised.telling = False
        module.train(training)
