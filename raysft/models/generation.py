"""Generation configs as models ship them: transformers loads some that it refuses to write.

Llama-2 comes with `temperature: 0.9` and without `do_sample: true`, so its answers are greedy and
the temperature is never looked at; writing that is an error. An export leaves such values out:
answers stay what they were.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Within:
    """What an answer is written within. stops: tokens that end it. forbidden: those it has not."""

    stops: tuple[int, ...]
    forbidden: tuple[int, ...] = ()

    def of(self, config: GenerationConfig) -> GenerationConfig:
        """`config`, within this."""
        config.eos_token_id = list(self.stops)
        config.suppress_tokens = list(self.forbidden) or None
        return config


def mend(net: PreTrainedModel) -> None:
    """Leave out of `net`'s generation config what transformers would not write, with a line.

    Raises ValueError, with transformers' words, where they name no value that could be left out.
    """
    if not net.can_generate():  # it has no such config
        return
    config, left = net.generation_config, []
    while (problem := _problem(config)) is not None:
        given = config.to_diff_dict()
        # Of the names in a problem the first is the one that cannot stay.
        wrong = next((name for name in re.findall(r"`(\w+)`", problem) if name in given), None)
        if wrong is None:
            raise ValueError(problem)
        left.append(f"{wrong}: {given[wrong]}")
        setattr(config, wrong, getattr(GenerationConfig(), wrong, None))
    if left:
        log.warning(
            "generation_config.json of the base: %s left out; transformers does not use it there, "
            "and refuses to write it",
            ", ".join(left),
        )


def _problem(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None
