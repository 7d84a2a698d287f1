"""`train.precision` of a run: what auto was when it began, whatever the machine of the day has."""

from __future__ import annotations

from raysft.config.schema import Config
from raysft.config.training import Precision


def with_precision(config: Config, precision: Precision) -> Config:
    """`config` that computes in it: what the run's config.yaml holds."""
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"train": train})


def as_begun(config: Config, before: Config) -> Config:
    """`config` in the precision of its run, where it names none. before: what the run was last
    started with."""
    if config.train.precision != "auto":
        return config
    return with_precision(config, before.train.precision)
