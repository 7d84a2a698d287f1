"""What does not go together with `train.objective`: found before anything starts."""

from __future__ import annotations

from raysft.config.families import Family, families
from raysft.config.marks import one_of
from raysft.config.objectives import Grpo
from raysft.config.schema import Config
from raysft.config.strategies import traits_of
from raysft.errors import Mistake


def check(config: Config, family: Family | None) -> list[Mistake]:
    """One for each contradiction. family: as far as the config alone tells it."""
    objective = config.train.objective
    if family is not None and objective not in family.objectives:
        able = [row.name for row in families() if objective in row.objectives]
        why = f"{objective} does not work with {family.name}; {one_of(able)} can"
        return [Mistake.of("train.objective", why)]
    if objective == "grpo":
        return [Mistake.of(key, why) for key, why in _grpo(config)]
    default, own = Grpo(), config.train.grpo
    return [
        Mistake.of(
            f"train.grpo.{key}",
            f"does nothing with train.objective: {objective}; set train.objective: grpo, or leave "
            "it out",
        )
        for key in Grpo.model_fields
        if getattr(own, key) != getattr(default, key)
    ]


def _grpo(config: Config) -> list[tuple[str, str]]:
    grpo, found = config.train.grpo, list[tuple[str, str]]()
    if grpo.group < 2:
        found.append(
            (
                "train.grpo.group",
                f"{grpo.group}, but an answer is held against the others of its group; at least 2",
            )
        )
    if not grpo.rewards:
        found.append(("train.grpo.rewards", "empty; name at least one, e.g. {accuracy: 1.0}"))
    budget = config.data.tokens_per_batch
    if budget == "auto":
        why = "auto is found by steps of train.objective: sft; give a number"
        found.append(("data.tokens_per_batch", why))
    elif grpo.max_new_tokens >= budget:
        found.append(
            (
                "train.grpo.max_new_tokens",
                f"{grpo.max_new_tokens} leaves no room for a prompt in data.tokens_per_batch: "
                f"{budget}; lower the one, or raise the other",
            )
        )
    if config.train.losses:
        why = "are of right answers, and train.objective: grpo learns from sampled ones; leave out"
        found.append(("train.losses", why))
    strategy = config.parallel.strategy
    if grpo.beta and traits_of(strategy).stage == 3:
        found.append(
            (
                "train.grpo.beta",
                f"the reference is kept beside weights that {strategy} hides; use fsdp, or beta: 0",
            )
        )
    return found
