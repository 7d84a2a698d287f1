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
    """Of each utterance, float32 [rows]. last: the cross-entropy of its last patch. hardest: the
    largest of those that go on; 0 where none does. goes_on: bool, whether one does. The
    probabilities of being right are exp(-these)."""

    last: torch.Tensor
    hardest: torch.Tensor
    goes_on: torch.Tensor


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

    logits: [N, 2]. wanted: int64 [N], `labels`. owners: int64 [N]: the utterance of each patch.
    rows: how many utterances. The loss is half of the mean of `last` over all utterances, and half
    of the mean of `hardest` over those with a patch that goes on (Ming-UniAudio's balanced form).
    """
    # Of what is undecided too: it is never counted.
    each = functional.cross_entropy(logits.float(), wanted.clamp(min=0), reduction="none")
    nothing = torch.zeros(rows, dtype=each.dtype, device=each.device)
    stops, goes_on = (wanted == STOPS).to(each.dtype), (wanted == GOES_ON).to(each.dtype)
    last = nothing.index_add(0, owners, each * stops)
    # The largest loss of those that go on is that of the smallest probability.
    hardest = nothing.scatter_reduce(0, owners, each * goes_on, "amax")
    with torch.no_grad():
        there = nothing.scatter_reduce(0, owners, goes_on, "amax") > 0
    return Stop(last, hardest, there)
