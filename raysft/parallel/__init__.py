"""How a model is spread over workers: one module a strategy, one small interface (`Strategy`)."""

from raysft.parallel.strategy import Strategy, make_strategy
from raysft.parallel.world import World

__all__ = ["Strategy", "World", "make_strategy"]
