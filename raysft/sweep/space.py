"""`sweep.space`: which values each key may take, and the points that are tried of it.

Points of a grid and of random search are a pure function of (space, seed, number), so that a sweep
that is started again tries the same ones.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from raysft.config import Config, to_tree
from raysft.config.load import validate
from raysft.config.overrides import set_key
from raysft.config.sweep import Sweep
from raysft.errors import UserError
from raysft.json_types import Json, JsonObject

KINDS = ("choice", "grid", "uniform", "loguniform", "randint")
OWN = ("run", "sweep", "plugins")  # sections that are the sweep's, not a trial's
MEASURE = ("data.eval", "evaluate")  # another one would measure something else
AGAIN = 1000  # draws of a point before all others are taken to be drawn

Point = dict[str, Json]
"""Dotted key -> its value in a trial."""


@dataclass(frozen=True)
class Dimension:
    """A key, and what it may be. values: of a choice or a grid; low, high: of the others, both
    included."""

    key: str
    kind: str
    values: tuple[Json, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether it has a list of values."""
        return self.kind in ("choice", "grid")

    def ends(self) -> tuple[Json, ...]:
        """Values that all have to be good for all of it to be."""
        if self.finite:
            return self.values
        return (int(self.low), int(self.high)) if self.kind == "randint" else (self.low, self.high)

    def draw(self, rng: np.random.Generator) -> Json:
        """A value, evenly (loguniform: its logarithm evenly)."""
        if self.finite:
            return copy.deepcopy(self.values[int(rng.integers(len(self.values)))])
        if self.kind == "randint":
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.kind == "loguniform":
            # Six digits say it all, and are read back as the same number.
            return float(f"{math.exp(rng.uniform(math.log(self.low), math.log(self.high))):.6g}")
        return float(f"{rng.uniform(self.low, self.high):.6g}")


def read_space(config: Config) -> list[Dimension]:
    """The dimensions of config.sweep.space, in its order.

    Raises UserError where it is empty, names a key that is none (with the nearest) or that may not
    vary, or gives a value that the key does not take.
    """
    space = config.sweep.space
    if not space:
        raise UserError(
            "sweep.space: is empty: name keys and what to try, e.g. "
            "sweep.space={optim.lr: {loguniform: [1e-5, 1e-3]}}"
        )
    dimensions = [_dimension(key, given) for key, given in space.items()]
    tree = to_tree(config)
    for dimension in dimensions:
        _check_key(dimension.key)
        for value in dimension.ends():
            point_config(tree, {dimension.key: value}, f"sweep.space.{dimension.key}")
    return dimensions


def _dimension(key: str, given: Json) -> Dimension:
    where = f"sweep.space.{key}"
    if isinstance(given, list):
        given = {"choice": given}
    if not isinstance(given, dict) or len(given) != 1 or next(iter(given)) not in KINDS:
        near = get_close_matches(next(iter(given)), KINDS, 1) if isinstance(given, dict) else []
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"{where}: a list of values, or one of {', '.join(f'{{{k}: [...]}}' for k in KINDS)}"
            f"{meant}; found {given!r}"
        )
    ((kind, values),) = given.items()
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: {kind} takes a list, e.g. {{{kind}: [1, 2]}}; found {values!r}")
    if kind in ("choice", "grid"):
        texts = [json.dumps(value, sort_keys=True) for value in values]
        if len(set(texts)) < len(texts):
            twice = next(text for text in texts if texts.count(text) > 1)
            raise UserError(f"{where}: {twice} is named twice")
        return Dimension(key, kind, tuple(values))
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    whole = kind == "randint"
    if len(values) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise UserError(f"{where}: {kind} takes [low, high], low below high; found {values!r}")
    if whole and any(number != int(number) for number in numbers):
        raise UserError(f"{where}: randint takes whole numbers; found {values!r}")
    if kind == "loguniform" and numbers[0] <= 0:
        raise UserError(f"{where}: loguniform takes numbers above 0; found {values!r}")
    return Dimension(key, kind, low=float(numbers[0]), high=float(numbers[1]))


def _check_key(key: str) -> None:
    """Raises UserError where a trial may not have its own."""
    if key.split(".")[0] in OWN:
        raise UserError(
            f"sweep.space.{key}: may not vary from trial to trial; the keys of model, data, peft, "
            "parallel, optim and train may (sweep.seeds varies run.seed)"
        )
    if any(key == own or key.startswith(own + ".") for own in MEASURE):
        raise UserError(
            f"sweep.space.{key}: may not vary: figures of trials could not be compared then"
        )


def point_config(tree: JsonObject, point: Point, where: str) -> Config:
    """The config of a tree with the values of a point. Raises UserError, which names `where`."""
    tree = copy.deepcopy(tree)
    for key, value in point.items():
        set_key(tree, key, copy.deepcopy(value))
    return validate(tree, where)


def check_size(sweep: Sweep, dimensions: Sequence[Dimension]) -> None:
    """Raises UserError where sweep.searcher and sweep.trials do not fit the space."""
    kind = searcher_of(sweep, dimensions)
    endless = [dimension.key for dimension in dimensions if not dimension.finite]
    if kind == "grid":
        if endless:
            raise UserError(
                f"sweep.searcher: grid, but sweep.space.{endless[0]} has no list of values; give "
                "it one, or use sweep.searcher=random"
            )
        size = math.prod(len(dimension.values) for dimension in dimensions)
        if sweep.trials is not None and sweep.trials != size:
            raise UserError(
                f"sweep.trials: {sweep.trials}, but the grid has {size} points; leave it out, or "
                "use sweep.searcher=random to try fewer"
            )
        return
    if sweep.trials is None:
        raise UserError("sweep.trials: say how many points to try, e.g. sweep.trials=20")
    drawn = [dimension for dimension in dimensions if dimension.kind != "grid"]
    if kind == "optuna" and len(drawn) < len(dimensions):
        raise UserError(
            "sweep.space: `grid:` goes with sweep.searcher=grid or random; optuna takes lists"
        )
    if all(dimension.finite for dimension in drawn):
        size = math.prod(len(dimension.values) for dimension in drawn)
        if size < sweep.trials and kind == "random":
            raise UserError(
                f"sweep.trials: {sweep.trials}, but there are only {size} different points to "
                f"draw; use sweep.trials={size} or fewer (sweep.seeds tries a point several times)"
            )


def searcher_of(sweep: Sweep, dimensions: Sequence[Dimension]) -> str:
    """What sweep.searcher: auto means: grid, where every key has a list and no number is asked."""
    if sweep.searcher != "auto":
        return sweep.searcher
    finite = all(dimension.finite for dimension in dimensions)
    return "grid" if finite and sweep.trials is None else "random"


def points(sweep: Sweep, dimensions: Sequence[Dimension], seed: int) -> Iterator[Point]:
    """All points of a grid, or those that random search draws; each once."""
    grid = searcher_of(sweep, dimensions) == "grid"
    fixed = [d for d in dimensions if d.kind == "grid" or grid]
    drawn = [d for d in dimensions if d not in fixed]
    # The last key changes fastest.
    combinations = list(itertools.product(*(d.values for d in fixed)))
    seen: set[str] = set()
    for number in range(1 if grid else sweep.trials or 0):
        rng = np.random.default_rng([seed, number])
        for _ in range(AGAIN):
            free = {d.key: d.draw(rng) for d in drawn}
            if (text := json.dumps(free, sort_keys=True)) not in seen or not drawn:
                break
        seen.add(text)
        for values in combinations:
            chosen = {**{d.key: v for d, v in zip(fixed, values)}, **free}
            yield {d.key: copy.deepcopy(chosen[d.key]) for d in dimensions}
