"""Pairs of answers laid out side by side, so that one pass gives what is learnt of both.

Stands in front of `base.SpeechModel.collate`, in training and in evaluation.
"""

from __future__ import annotations

import numpy as np

from raysft.data import pairs
from raysft.data.example import MicroBatch, Sequence
from raysft.losses import dpo
from raysft.models.layout import CONTEXT, IGNORED


def sequences(batch: MicroBatch) -> list[Sequence]:
    """Those of a micro-batch: the inverse of `MicroBatch.join`, but for seconds."""
    if not batch.ids:
        return []
    cuts = np.cumsum(batch.lengths)[:-1]
    parts = zip(np.split(batch.input_ids, cuts), np.split(batch.labels, cuts), strict=True)
    found = [
        Sequence(id_, task, *part)
        for id_, task, part in zip(batch.ids, batch.tasks, parts, strict=True)
    ]
    for name, ragged in batch.arrays.items():
        for sequence, arrays in zip(found, ragged.of_sequences(len(found)), strict=True):
            sequence.arrays[name] = arrays
    return found


def both(batch: MicroBatch) -> MicroBatch:
    """A micro-batch in which each chosen answer is followed by its rejected one, all tokens with
    their context (`losses.dpo`), references still to be asked for; itself where it has no pair."""
    if pairs.REJECTED not in batch.arrays:
        return batch
    found = []
    for number, sequence in enumerate(sequences(batch)):
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
