"""Where speech ends: the balanced loss of a stop head over the patches of each utterance.

An utterance has one last patch, and many that are not: the loss takes the last ones and of the
others the hardest of each utterance, each kind with half of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

STOPS, GOES_ON, UNDECIDED = 1, 0, -100
NEAR = 3  # patches before the last of which nothing is learnt


class Stop(NamedTuple):
    """Sums of a micro-batch. positive, negative: float32 [], of the cross-entropies of the last
    patches, and of the hardest others. likely_positive, likely_negative: of their probabilities of
    being right, detached. positives, negatives: how many of each."""

    positive: torch.Tensor
    negative: torch.Tensor
    likely_positive: torch.Tensor
    likely_negative: torch.Tensor
    positives: int
    negatives: int


def labels(patches: int) -> np.ndarray:
    """int64 [patches] of an utterance: the last stops, the three before it are undecided, all
    earlier go on. One of fewer than 5 patches has none that goes on."""
    found = np.full(patches, UNDECIDED, np.int64)
    found[: max(0, patches - 1 - NEAR)] = GOES_ON
    if patches:
        found[-1] = STOPS
    return found


def stop_loss(logits: torch.Tensor, wanted: torch.Tensor, owners: torch.Tensor, rows: int) -> Stop:
    """Cross-entropies of the last patch of each utterance, and of that patch of each which goes on
    and of which the head is least sure.

    logits: [N, 2]. wanted: int64 [N], `labels`. owners: int64 [N], ascending: the utterance of each
    patch. rows: how many utterances. The two sums are to be divided each by its own count over all
    workers, and weigh one half (Ming-UniAudio's balanced form); an utterance without a patch that
    goes on adds nothing to the second.
    """
    each = functional.cross_entropy(
        logits.float(), wanted.clamp(min=0), reduction="none"
    )  # of what is undecided too: never counted
    stops, goes_on = wanted == STOPS, wanted == GOES_ON
    positive = (each * stops).sum()
    # The largest loss of those that go on is that of the smallest probability.
    worst = torch.zeros(rows, dtype=each.dtype, device=each.device)
    worst = worst.scatter_reduce(0, owners, each * goes_on, "amax")
    negatives = torch.zeros(rows, dtype=torch.bool, device=each.device)
    negatives = negatives.index_put((owners[goes_on],), torch.ones((), dtype=torch.bool))
    with torch.no_grad():
        likely = (-each).exp()
        worst_likely = (-worst).exp()
    return Stop(
        positive,
        worst.sum(),
        (likely * stops).sum(),
        (worst_likely * negatives).sum(),
        int(stops.sum()),
        int(negatives.sum()),
    )
