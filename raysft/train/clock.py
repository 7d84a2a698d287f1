"""The time that training takes, apart from what is done beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Training time since the last logged line, the part of it spent waiting for data, and steps.

    Evaluations and checkpoints are set aside: they are not what a step costs.
    """

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._seconds = self._waited = 0.0
        self._steps = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a step's data."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun
        self._steps += 1

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is not training."""
        now = time.monotonic()
        self._seconds, self._since = self._seconds + now - self._since, now
        yield
        self._since = time.monotonic()

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        now = time.monotonic()
        seconds = self._seconds + now - self._since
        return {"seconds": seconds, "waited": self._waited, "steps": self._steps}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self._since = time.monotonic()
        self._seconds, self._waited = state["seconds"], state["waited"]
        self._steps = int(state["steps"])

    def lap(self) -> dict[str, float]:
        """`state`, and start again."""
        found = self.state()
        self.load({"seconds": 0.0, "waited": 0.0, "steps": 0})
        return found
