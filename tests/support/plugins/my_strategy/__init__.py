"""A strategy: its row. Its class is imported when a config asks for it."""

from __future__ import annotations

from raysft.config.strategies import Refusal, StrategyTraits, register

ROW = StrategyTraits(
    "my_strategy",
    refuses=(Refusal("train.compile", True, "my_strategy compiles nothing; use ddp"),),
    implementation="my_strategy.wrap:MyStrategy",
)
register(ROW)
