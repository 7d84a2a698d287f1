"""How a model is spread over workers: one module a strategy, one small interface (`Strategy`).

The rows of `config.strategies` say what each does; `make` finds its class.
"""

from raysft.config.strategies import register
from raysft.parallel.make import make_strategy
from raysft.parallel.strategy import Strategy
from raysft.parallel.world import World

__all__ = ["Strategy", "World", "make_strategy", "register"]
