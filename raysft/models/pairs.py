"""Pairs of answers laid out side by side, so that one pass gives what is learnt of both.

Stands in front of `base.SpeechModel.collate`, in training and in evaluation.
"""

from __future__ import annotations

import numpy as np

from raysft.data import pairs
from raysft.data.example import MicroBatch
from raysft.losses import dpo
from raysft.models.layout import CONTEXT, IGNORED


def both(batch: MicroBatch) -> MicroBatch:
    """A micro-batch in which each chosen answer is followed by its rejected one, all tokens with
    their context (`losses.dpo`), references still to be asked for; itself where it has no pair."""
    if pairs.REJECTED not in batch.arrays:
        return batch
    found = []
    for number, sequence in enumerate(batch.sequences()):
        for answer, side in zip(pairs.apart(sequence), (dpo.CHOSEN, dpo.REJECTED)):
            tokens = int((answer.labels[1:] != IGNORED).sum())
            context = np.zeros((tokens, dpo.Preference.columns), np.float32)
            context[:, dpo.PAIR], context[:, dpo.SIDE] = number, side
            context[:, dpo.LENGTH], context[:, dpo.WEIGHT] = tokens, 1.0
            answer.arrays[CONTEXT] = [context]
            found.append(answer)
    joined = MicroBatch.join(batch.epoch, batch.step, batch.lane, found, batch.quarantined)
    joined.seconds = batch.seconds
    return joined
