"""Answers that are ratings: which tokens are digits, what the model would have given them, and
whether it would have said the right one.

The mean of probabilities is taken over the scale's digits, of the logits at the first digit inside
the answer as the model gives them, whatever would be sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from raysft.losses.chunked import TokenLoss
from raysft.losses.right import of_targets, right
from raysft.models.base import SpeechModel
from raysft.models.watched import Generated
from raysft.scorers import figures_of
from raysft.scorers.rated import Rated
from raysft.scorers.rating_tokens import RIGHT, SCORES, SEEN, TERM
from raysft.scorers.ratings import SCORER, TASK, digit_at, model_score

_FRAMES = ("<answer>{}</answer>", "<answer> {}</answer>", "[A]{}[B]", "[A] {}[B]")


@dataclass(frozen=True)
class Digits:
    """The tokens of 0 to 9, as a tokenizer writes them in answers.

    ways: ids of 0 to 9, a row for each way in which they are written; none where a digit is no
    token of its own.
    """

    ways: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Digits:
        """Of a tokenizer: what differs between an answer of one digit and another."""
        found = []
        for frame in _FRAMES:
            rows = [
                tokenizer.encode(frame.format(digit), add_special_tokens=False)
                for digit in range(10)
            ]
            if len({len(row) for row in rows}) != 1:
                continue
            table = np.array(rows)
            differ = np.flatnonzero((table != table[0]).any(0))
            if len(differ) == 1 and len(set(table[:, differ[0]].tolist())) == 10:
                found.append(tuple(table[:, differ[0]].tolist()))
        return cls(tuple(dict.fromkeys(found)))

    @property
    def watched(self) -> list[int]:
        """All of their ids."""
        return sorted({id_ for way in self.ways for id_ in way})

    def probability(
        self, answer: Generated, rated: Rated, tokenizer: PreTrainedTokenizerBase
    ) -> float | None:
        """The mean of a rating by the model's probabilities; None where the answer has none."""
        if model_score(answer.text, rated) is None:
            return None
        at = _token_at(answer.tokens, rated, tokenizer)
        if at is None:
            return None
        scale = range(rated.lowest, rated.highest + 1)
        places = {id_: place for place, id_ in enumerate(self.watched)}
        for way in self.ways:
            if answer.tokens[at] in way:
                logits = answer.logits[at, [places[way[score]] for score in scale]]
                chances = np.exp(logits.astype(np.float64) - logits.max())
                return float(chances @ np.array(scale) / chances.sum())
        return None


def _token_at(
    tokens: Sequence[int], rated: Rated, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """Which token writes the first digit of the rating."""

    def text(count: int) -> str:
        found = tokenizer.decode(list(tokens[:count]), skip_special_tokens=True)
        assert isinstance(found, str)
        return found

    at = digit_at(text(len(tokens)), rated.label)
    if at is None:
        return None
    low, high = 0, len(tokens)  # text(low) ends before it, text(high) has it
    while high - low > 1:
        middle = (low + high) // 2
        if len(text(middle)) > at:
            high = middle
        else:
            low = middle
    return high - 1


@contextmanager
def counting(speech_model: SpeechModel, digits: Digits) -> Iterator[set[str]]:
    """Counts of right tokens beside the losses, for the length of a `with` block; gives the names
    of their terms."""
    more: list[tuple[str, TokenLoss, float]] = [(TERM, right, 0.0)]
    for score in SCORES if digits.ways else ():
        seen, hit = of_targets({way[score] for way in digits.ways})
        more += [(SEEN.format(score), seen, 0.0), (RIGHT.format(score), hit, 0.0)]
    own = list(speech_model.more_losses)
    speech_model.more_losses += more
    try:
        yield {name for name, _, _ in more}
    finally:
        speech_model.more_losses[:] = own


def judged(tasks: Sequence[str], metrics: Mapping[str, Sequence[str]]) -> bool:
    """Whether answers to examples of these tasks are ratings. metrics: `evaluate.metrics`."""
    own = {figure.name for figure in SCORER.figures}
    return any(task == TASK or own & set(figures_of(task, metrics)) for task in tasks)
