"""The class of my_strategy."""

from __future__ import annotations

from raysft.parallel.ddp import Ddp


class MyStrategy(Ddp):
    """Does what ddp does."""
