"""A step of terms that are counted in different things, against the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raysft.config import Config
from raysft.losses import Term
from raysft.parallel import World, make_strategy
from raysft.train.step import StepBatch, Turn, forward_backward

WORDS, FRAMES = (3.0, 5.0), (40.0, 8.0)  # of each turn


class Two(nn.Module):
    """w squared a word, 7 w a frame at half weight, and w cubed once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch: dict[str, torch.Tensor]) -> list[Term]:
        """Terms of one turn."""
        words, frames = batch["words"], batch["frames"]
        first, second, third = words * self.w**2, frames * 7 * self.w, self.w**3
        return [
            Term("text", first.detach(), words, {}, first, "words"),
            Term("flow", second.detach(), frames, {}, second, "frames", 0.5),
            Term("penalty", third.detach(), torch.tensor(1), {}, third, None, reported=False),
        ]


@pytest.mark.parametrize("others", [0.0, 2.0])
def test_each_term_is_divided_by_its_own_count_over_all_workers(others: float) -> None:
    """others: what is elsewhere, in parts of what is here."""
    module = Two()
    strategy = make_strategy(Config(), module, World.current())
    turns = [
        Turn(lane, {"words": torch.tensor(w), "frames": torch.tensor(f)}, {"words": w, "frames": f})
        for lane, (w, f) in enumerate(zip(WORDS, FRAMES, strict=True))
    ]
    batch = StepBatch(0, 1, {}, turns)
    counts = {name: (1 + others) * count for name, count in batch.counts().items()}
    sums = forward_backward(strategy, World.current(), batch, [], counts, 0)
    here, w = 1 / (1 + others), 2.0
    assert module.w.grad is not None
    assert module.w.grad.item() == pytest.approx(here * 2 * w + 0.5 * here * 7 + 3 * w**2)
    assert sums.means([]) == pytest.approx(
        {"loss": w**2 + 0.5 * 7 * w, "term/text": w**2, "term/flow": 7 * w}
    )
