"""Checks of what is to be learnt against the data, before a worker starts."""

from __future__ import annotations

import numpy as np

from raysft.config import Config
from raysft.data.index.build import Index
from raysft.errors import UserError


def check(config: Config, index: Index, tasks: list[str]) -> None:
    """Raises UserError where `train` asks for what the training data has not. tasks: of it."""
    _check_task_weights(config, tasks)
    if config.train.objective == "grpo":
        _check_room(config, index)


def _check_task_weights(config: Config, tasks: list[str]) -> None:
    """A name that no example has would weigh nothing, without a word."""
    for name in config.train.task_weights:
        if name not in tasks:
            raise UserError(
                f"train.task_weights: {name} is no task of the training data, which has "
                f"{', '.join(sorted(tasks))}; name one of these"
            )


def _check_room(config: Config, index: Index) -> None:
    """A prompt with its longest answer has to fit a turn: memory is made for no more. An example
    is known by its length with the right answer, which is at least a token and its end."""
    budget, longest = config.data.budget, config.train.grpo.max_new_tokens
    planned = np.asarray(index.tokens) * (np.asarray(index.tokens) <= budget)
    row = int(planned.argmax()) if len(planned) else 0
    needed = int(planned.max(initial=0)) - 2 + longest
    if needed > budget:
        name = index.ids(np.array([row]))[0]
        raise UserError(
            f"train.grpo.max_new_tokens: {name} takes {planned[row]} positions; its prompt with an "
            f"answer of {longest} tokens does not fit data.tokens_per_batch: {budget}; raise that "
            f"to {needed}, or lower max_new_tokens to {max(1, budget - int(planned[row]) + 2)}"
        )
