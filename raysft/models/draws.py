"""Answers that are sampled by numbers given before: the same whatever they are generated with.

Under `base.SpeechModel.answers`. A row takes one number from [0, 1) a token, its own, and the token
where the distribution function of its probabilities passes it. So an answer depends on its own
numbers and its logits alone: not on the rows beside it, nor on who generates it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Sampling:
    """temperature: divides logits. top_p: share of the likeliest tokens that may be chosen. never:
    tokens that may not. seen: called before each token."""

    temperature: float = 1.0
    top_p: float = 1.0
    never: Sequence[int] = ()
    seen: Callable[[], None] = lambda: None


class Draws(LogitsProcessor):
    """Leaves of each row's logits one token. Costs a pass over them a token."""

    def __init__(self, settings: Sampling, draws: np.ndarray) -> None:
        """draws: float64 [rows, tokens] from [0, 1). Rows that have none (which are there for the
        shapes alone) take the first token that may be chosen."""
        self._settings, self._draws, self._place = settings, draws, 0

    def of(self, rows: Sequence[int]) -> Draws:
        """That of some rows, in this order, from their first token on."""
        return Draws(self._settings, self._draws[np.array(rows, np.int64)])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] with all but one of each row at -inf."""
        self._settings.seen()
        given = np.zeros(len(scores))
        if self._place < self._draws.shape[1]:
            given[: len(self._draws)] = self._draws[:, self._place]
        self._place += 1
        draws = torch.from_numpy(given).to(scores.device)
        never = torch.tensor(list(self._settings.never), dtype=torch.long, device=scores.device)
        scores = scores.index_fill(1, never, -torch.inf)
        tokens = chosen(scores, draws, self._settings.temperature, self._settings.top_p)
        left = torch.full_like(scores, -torch.inf)
        return left.scatter_(1, tokens.unsqueeze(1), 0.0)


def chosen(
    logits: torch.Tensor, draws: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Tokens [R] of logits [R, V] by draws float64 [R] from [0, 1).

    top_p: of the likeliest tokens so many may be chosen as it takes to have that share between
    them; the likeliest always.
    """
    shares = torch.softmax(logits.float() / temperature, -1).double()
    if top_p < 1:
        ordered, order = shares.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        shares = torch.zeros_like(shares).scatter_(-1, order, ordered)
    passed = shares.cumsum(-1)
    found = torch.searchsorted(passed, (draws * passed[:, -1]).unsqueeze(1), right=True)
    # Rounded up, a draw may be the whole: then the last that has a share.
    numbers = torch.arange(shares.shape[-1], device=shares.device)
    last = (numbers * (shares > 0)).amax(-1, keepdim=True)
    return torch.minimum(found, last).squeeze(1)
