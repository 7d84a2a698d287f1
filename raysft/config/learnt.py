"""What does not go together with `train.objective`: found before anything starts."""

from __future__ import annotations

from collections.abc import Callable

from raysft.config.deepspeed import added
from raysft.config.families import Family, families
from raysft.config.marks import one_of
from raysft.config.objectives import Dpo, Grpo, Objective
from raysft.config.schema import Config
from raysft.config.section import Section
from raysft.errors import Mistake

_SECOND_COPY = "zero_optimization.zero_hpz_partition_size"


def check(config: Config, family: Family | None) -> list[Mistake]:
    """One for each contradiction. family: as far as the config alone tells it."""
    objective = config.train.objective
    if family is not None and objective not in family.objectives:
        able = [row.name for row in families() if objective in row.objectives]
        why = f"{objective} does not work with {family.name}; {one_of(able)} can"
        return [Mistake.of("train.objective", why)]
    found = [Mistake.of(key, why) for key, why in _CHECKS[objective](config)]
    for name, default in (("grpo", Grpo()), ("dpo", Dpo())):
        own: Section = getattr(config.train, name)
        if name == objective:
            continue
        found += [
            Mistake.of(
                f"train.{name}.{key}",
                f"does nothing with train.objective: {objective}; set train.objective: {name}, or "
                "leave it out",
            )
            for key in type(default).model_fields
            if getattr(own, key) != getattr(default, key)
        ]
    return found


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
    if budget != "auto" and grpo.max_new_tokens >= budget:
        found.append(
            (
                "train.grpo.max_new_tokens",
                f"{grpo.max_new_tokens} leaves no room for a prompt in data.tokens_per_batch: "
                f"{budget}; lower the one, or raise the other",
            )
        )
    return found + _beside(config, "sampled ones", grpo.beta > 0, "grpo.beta", "beta: 0")


def _dpo(config: Config) -> list[tuple[str, str]]:
    dpo, found = config.train.dpo, list[tuple[str, str]]()
    if dpo.label_smoothing and dpo.loss != "sigmoid":
        why = f"does nothing with train.dpo.loss: {dpo.loss}; leave it out"
        found.append(("train.dpo.label_smoothing", why))
    return found + _beside(config, "pairs", True, "objective", "another objective")


def _beside(
    config: Config, learnt: str, reference: bool, key: str, remedy: str
) -> list[tuple[str, str]]:
    """What goes with no objective but right answers. reference: there is one, as `key` says;
    remedy: what has none."""
    objective, found = config.train.objective, list[tuple[str, str]]()
    if config.data.tokens_per_batch == "auto":
        why = "auto is found by steps of train.objective: sft; give a number"
        found.append(("data.tokens_per_batch", why))
    if config.train.losses:
        why = f"are of right answers, and train.objective: {objective} learns from {learnt}"
        found.append(("train.losses", f"{why}; leave out"))
    if reference and added(config).get(_SECOND_COPY, 1) not in (0, 1):
        why = f"the reference is of one copy of the weights, and {_SECOND_COPY} keeps two"
        found.append((f"train.{key}", f"{why}; leave that out, or use {remedy}"))
    return found


_CHECKS: dict[Objective, Callable[[Config], list[tuple[str, str]]]] = {
    "sft": lambda config: [],
    "grpo": _grpo,
    "dpo": _dpo,
}
