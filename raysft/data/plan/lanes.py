"""How the lanes of a step are shared out among the groups of `data.mix`."""

from __future__ import annotations

import math

import numpy as np

from raysft.errors import UserError


class LaneShares:
    """How many micro-batches of each group a step has: its share of the lanes, exactly where that
    is a whole number, else the whole number below or above it, in every step; exact on average."""

    def __init__(self, mix: list[float], lanes: int) -> None:
        shares = np.array(mix) / sum(mix)
        if shares.min() * lanes < 1 - 1e-9:
            raise UserError(
                f"data.lanes={lanes} is too few for data.mix: a share of {shares.min():.3g} is "
                "less than one lane, so it cannot hold in every step; use "
                f"data.lanes={math.ceil(1 / shares.min() - 1e-9)} or more"
            )
        exact = shares * lanes
        self._least = np.floor(exact + 1e-9).astype(np.int64)
        self._spare = lanes - int(self._least.sum())
        # The spare lanes go to the groups hit by equally spaced points on their fractions.
        self._edges = np.cumsum(np.maximum(exact - self._least, 0))
        self._edges[-1] = self._spare

    def __len__(self) -> int:
        return len(self._least)

    def at(self, step: int) -> list[int]:
        """The micro-batches of each group in the step after `step` steps."""
        if not self._spare:
            return self._least.tolist()
        # Multiples of the golden ratio: each group is hit evenly over the steps.
        offset = step * 0x9E3779B97F4A7C15 % 2**64 / 2**64
        hit = np.searchsorted(self._edges, offset + np.arange(self._spare), side="right")
        return (self._least + np.bincount(hit, minlength=len(self._least))).tolist()
