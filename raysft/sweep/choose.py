"""Who says which point comes next: a list, or optuna, which learns from those before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from raysft.errors import UserError
from raysft.sweep.space import Dimension, Point


class Chooser(Protocol):
    """Points, one after the other."""

    def next(self) -> Point | None:
        """The next point; None: there are no more."""

    def begun(self, point: Point) -> None:
        """The next point is this one: it was chosen by an earlier start."""

    def tell(self, number: int, value: float | None) -> None:
        """What point `number`, counted from 0, came to: its metric; None: it failed."""


class Listed:
    """All points are known beforehand: a grid's, or those of random search."""

    def __init__(self, points: Iterable[Point]) -> None:
        self._left = list(points)

    def next(self) -> Point | None:
        """See Chooser."""
        return self._left.pop(0) if self._left else None

    def begun(self, point: Point) -> None:
        """See Chooser. The sweep's folder has been held against the config: it is the same one."""
        self.next()

    def tell(self, number: int, value: float | None) -> None:
        """See Chooser."""


class Optuna:
    """Optuna's TPE: Bergstra et al. 2011, tree-structured Parzen estimators."""

    def __init__(self, dimensions: Sequence[Dimension], trials: int, mode: str, seed: int) -> None:
        """mode: min or max. Raises UserError where optuna is not installed."""
        try:
            import optuna
        except ImportError:
            raise UserError(
                "sweep.searcher: optuna is not installed: pip install 'raysft[optuna]', or use "
                "sweep.searcher=random"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._dimensions = {dimension.key: dimension for dimension in dimensions}
        self._left = trials
        self._failed = optuna.trial.TrialState.FAIL
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {}
        for dimension in dimensions:
            low, high = dimension.low, dimension.high
            self._distributions[dimension.key] = (
                # Positions: what a list holds need not be a number or a text.
                optuna.distributions.CategoricalDistribution(list(range(len(dimension.values))))
                if dimension.finite
                else optuna.distributions.IntDistribution(int(low), int(high))
                if dimension.kind == "randint"
                else optuna.distributions.FloatDistribution(
                    low, high, log=dimension.kind == "loguniform"
                )
            )
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self._study = optuna.create_study(
            direction="minimize" if mode == "min" else "maximize", sampler=sampler
        )

    def next(self) -> Point | None:
        """See Chooser."""
        if not self._left:
            return None
        self._left -= 1
        chosen = self._study.ask(self._distributions).params
        return {
            key: dimension.values[chosen[key]] if dimension.finite else chosen[key]
            for key, dimension in self._dimensions.items()
        }

    def begun(self, point: Point) -> None:
        """See Chooser."""
        self._left -= 1
        params = {
            key: dimension.values.index(point[key]) if dimension.finite else point[key]
            for key, dimension in self._dimensions.items()
        }
        self._study.enqueue_trial(params)
        self._study.ask(self._distributions)

    def tell(self, number: int, value: float | None) -> None:
        """See Chooser."""
        if value is None or not math.isfinite(value):
            self._study.tell(number, state=self._failed)
        else:
            self._study.tell(number, value)
