"""The objective of a worker's job, as `train.objective` says."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from raysft.config import Config
from raysft.config.strategies import traits_of
from raysft.models.base import SpeechModel
from raysft.models.layout import Static
from raysft.models.supervised import Supervised
from raysft.objectives.dpo import DpoObjective, paired, preference_of
from raysft.objectives.frozen import Frozen
from raysft.objectives.grpo import GrpoObjective, policy_of, prompts
from raysft.objectives.rollout import Sampler
from raysft.parallel import Strategy, World
from raysft.run.catalogue import Saved
from raysft.train.checkpoint import load_weights
from raysft.train.feed import LayOut, turn_of
from raysft.train.job import Objective


class Built(NamedTuple):
    """objective: None for right answers. lay_out: of what the feed reads; None: as always."""

    objective: Objective | None
    lay_out: LayOut | None


def prepare(config: Config, speech_model: SpeechModel) -> None:
    """Tell a model, before a strategy wraps it, what its batches teach."""
    if config.train.objective == "sft":
        return
    assert isinstance(speech_model.supervised, Supervised)  # its family has this objective
    if config.train.objective == "grpo":
        speech_model.supervised.learns = policy_of(config.train.grpo)
    else:
        speech_model.supervised.learns = preference_of(config.train.dpo)


def build(
    config: Config,
    speech_model: SpeechModel,
    strategy: Strategy,
    world: World,
    static: Static | None,
    initial: Saved | None,
) -> Built:
    """initial: the weights that the run begins with, where they are not those of `strategy`."""
    if config.train.objective == "sft":
        return Built(None, None)
    settings, as_always = config.train.grpo, partial(turn_of, speech_model, static=static)
    reference = None
    if config.train.referenced:
        if initial is not None:
            load_weights(initial, strategy)
        reference = Frozen(strategy.module)
    if config.train.objective == "dpo":
        supervised = speech_model.supervised
        assert isinstance(supervised, Supervised) and reference is not None
        objective = DpoObjective(supervised, strategy, world, reference)
        return Built(objective, partial(paired, lay_out=as_always))
    sampler = Sampler(
        speech_model,
        strategy,
        world,
        settings,
        settings.tokens_per_batch or config.data.budget,
        config.run.seed,
        traits_of(config.parallel.strategy).synced,
    )
    sampled = GrpoObjective(
        settings,
        speech_model,
        strategy,
        world,
        sampler,
        reference,
        as_always,
        config.data.budget,
        config.data.mode == "padded",
    )
    return Built(sampled, prompts)
