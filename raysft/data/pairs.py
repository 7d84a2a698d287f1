"""Pairs of answers of which one is preferred: as two examples, and as one sequence with another.

Stands between source and encoder: a pair is read, measured, planned and laid out as one, for what
it teaches is known only of both (`losses.dpo`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from raysft.data.example import ASSISTANT, Example, Sequence
from raysft.errors import BadExample

REJECTED = "rejected"
"""The array of a sequence that holds the other one: int32 [T', 2], its ids and labels."""


def answers(example: Example, needed: bool) -> list[Example]:
    """The chosen answer and the rejected one, of which what follows the turns that both have is
    learnt. An example without a rejected one alone, or, where that is needed, BadExample."""
    other = example.rejected
    if other is None:
        if needed:
            raise BadExample(
                "has no rejected answer, and train.objective: dpo learns from pairs of a chosen "
                "and a rejected one",
                "no pair",
            )
        return [example]
    common = 0
    for one, two in zip(example.turns, other.turns):
        if one != two:
            break
        common += 1
    found = [_without(example, common), _without(other, common)]
    if found[0].turns == found[1].turns and example.output == other.output:
        raise BadExample("its chosen and its rejected answer are the same", "no pair")
    return found


def _without(example: Example, common: int) -> Example:
    """Nothing of its first turns is learnt."""
    before = (
        replace(turn, learnt=False) if turn.role == ASSISTANT else turn
        for turn in example.turns[:common]
    )
    return replace(example, turns=(*before, *example.turns[common:]), rejected=None)


def joined(chosen: Sequence, rejected: Sequence) -> Sequence:
    """As one, which hears what the chosen hears. Raises BadExample where the other hears more."""
    names = chosen.arrays.keys() | rejected.arrays.keys()
    for name in names:
        own, others = chosen.arrays.get(name, []), rejected.arrays.get(name, [])
        if len(own) != len(others) or not all(map(np.array_equal, own, others)):
            raise BadExample(
                "its chosen and its rejected answer have other clips, which this model reads as "
                "they are: clips belong into the prompt",
                "no pair",
            )
    other = np.stack([rejected.input_ids, rejected.labels], 1).astype(np.int32)
    return replace(chosen, arrays={**chosen.arrays, REJECTED: [other]})


def apart(sequence: Sequence) -> list[Sequence]:
    """The inverse of `joined`; what is no pair, alone."""
    arrays = dict(sequence.arrays)
    found = [replace(sequence, arrays=arrays)]
    for other in arrays.pop(REJECTED, []):
        ids, labels = other[:, 0], other[:, 1]
        alone = replace(sequence, input_ids=ids, labels=labels, arrays=dict(arrays), seconds=0.0)
        found.append(alone)
    return found
