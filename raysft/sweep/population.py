"""Population based training (Jaderberg et al. 2017): who goes on from whose checkpoint.

Every `sweep.interval` steps all trials are compared at the same step. Each of the worst takes over
the checkpoint of one of the best, into its own run's folder, and its values, changed a little. That
its ledger still is the ledger of what it was trained on is because trials share data, plan and
seed: up to that step all have read the same.

    population.jsonl   a line a comparison: {"step", "values": by trial, "takeovers": [{"trial",
                       "from", "point", "chain"}]}; and {"step", "done"} once its takeovers are made

A comparison is a pure function of (run.seed, step, values), is written down before anything is done
about it, and what is done can be done again from any point at which it was interrupted: no trial
goes on before the line that says `done`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raysft.config import Config, to_tree
from raysft.config.resume import rule_of, stepwise
from raysft.errors import UserError
from raysft.json_types import Json, JsonObject
from raysft.run import plans
from raysft.run.catalogue import MARKER, Catalogue, Saved
from raysft.run.evaluations import Evaluations
from raysft.run.folder import read_config, write_config
from raysft.run.lines import Lines, read_lines
from raysft.run.ownership import Ownership
from raysft.sweep.folder import SweepFolder, Trial
from raysft.sweep.space import Dimension, Point, point_config, points, searcher_of

NAME = "population.jsonl"
ANEW = 0.25  # how often a value is drawn anew
FACTORS = (0.8, 1.2)


@dataclass(frozen=True)
class Takeover:
    """Trial number `trial` goes on from the checkpoint of number `donor` at `step`, with `point`.
    chain: where its own ledger stands there, by lane; None: its ledger has no chain."""

    step: int
    trial: int
    donor: int
    point: Point
    chain: JsonObject | None = None


def check(config: Config, dimensions: Sequence[Dimension]) -> None:
    """Raises UserError where a population cannot be trained as `config.sweep` says."""
    sweep = config.sweep
    allowed = stepwise()
    for dimension in dimensions:
        if not rule_of(dimension.key).steps:
            raise UserError(
                f"sweep.space.{dimension.key}: sweep.scheduler: pbt changes keys while a run goes "
                f"on, and a run keeps this one, or no step depends on it; may vary: "
                f"{', '.join(allowed)}"
            )
    if sweep.seeds != 1:
        raise UserError(
            f"sweep.seeds: {sweep.seeds}, but trials of sweep.scheduler: pbt take checkpoints over "
            "from each other, which other data orders do not fit; set sweep.seeds=1"
        )
    if searcher_of(sweep, dimensions) == "optuna":
        raise UserError(
            "sweep.searcher: optuna chooses by trials that have ended, and those of "
            "sweep.scheduler: pbt begin together; use random or grid"
        )
    if config.checkpoint.resume != "auto":
        raise UserError(
            f"checkpoint.resume: {config.checkpoint.resume}, but with sweep.scheduler: pbt trials "
            "go on from checkpoints; set checkpoint.resume=auto"
        )
    every = config.evaluate.every
    if interval(config) % every:
        raise UserError(
            f"sweep.interval: {sweep.interval} is no multiple of evaluate.every: {every}; trials "
            "are compared by evaluations"
        )
    if len(list(points(sweep, dimensions, config.run.seed))) < 2:
        raise UserError("sweep.trials: sweep.scheduler: pbt needs at least 2 trials to compare")


def interval(config: Config) -> int:
    """Steps between two comparisons."""
    return config.sweep.interval or config.evaluate.every


def decide(
    dimensions: Sequence[Dimension],
    values: Mapping[int, float],
    current: Mapping[int, Point],
    *,
    step: int,
    mode: str,
    quantile: float,
    seed: int,
) -> list[Takeover]:
    """Who of the trials in `values` takes over from whom, and what it goes on with.

    values, current: what each has come to at `step` (a number; the worst where it is none), and its
    point. One that is as good as its donor stays what it is.
    """
    sign = 1.0 if mode == "min" else -1.0
    order = sorted(values, key=lambda number: (sign * values[number], number))
    count = min(math.ceil(quantile * len(order)), len(order) // 2)
    found = []
    for number in sorted(order[len(order) - count :]):
        rng = np.random.default_rng([seed, step, number])
        donor = order[int(rng.integers(count))]
        if values[donor] != values[number]:
            point = {d.key: changed(d, current[donor][d.key], rng) for d in dimensions}
            found.append(Takeover(step, number, donor, point))
    return found


def changed(dimension: Dimension, value: Json, rng: np.random.Generator) -> Json:
    """A value near `value`: of a list a neighbour, of a range 0.8 or 1.2 times it, within its
    bounds; now and then another one of all."""
    if rng.random() < ANEW:
        return dimension.draw(rng)
    up = bool(rng.integers(2))
    if dimension.finite:
        at, last = dimension.values.index(value), len(dimension.values) - 1
        at += 1 if (up and at < last) or not at else -1
        return copy.deepcopy(dimension.values[min(at, last)])
    assert isinstance(value, int | float)
    near = value * FACTORS[up]
    if dimension.kind == "randint":
        near = round(near) if round(near) != value else value + (1 if up else -1)
    near = min(max(near, dimension.low), dimension.high)
    return int(near) if dimension.kind == "randint" else float(f"{near:.6g}")


class Population:
    """The comparisons of a sweep, and what follows from them."""

    def __init__(self, sweep: SweepFolder) -> None:
        self._sweep = sweep

    def _lines(self) -> list[JsonObject]:
        return read_lines(self._sweep.path / NAME, {"step": int})

    def takeovers(self) -> list[Takeover]:
        """All, oldest first."""
        return [
            Takeover(line["step"], one["trial"], one["from"], one["point"], one["chain"])
            for line in self._lines()
            for one in line.get("takeovers", [])
        ]

    @property
    def step(self) -> int:
        """Of the last comparison; 0: there was none yet."""
        return max((line["step"] for line in self._lines()), default=0)

    def point(self, trial: Trial) -> Point:
        """What a trial goes on with now."""
        return self.points([trial])[trial.number]

    def points(self, trials: Sequence[Trial]) -> dict[int, Point]:
        """By number, what each trial goes on with now."""
        found = {trial.number: trial.point for trial in trials}
        taken = {one.trial: one.point for one in self.takeovers()}
        return {number: taken.get(number, point) for number, point in found.items()}

    def write(self, step: int, values: Mapping[int, float], found: Sequence[Takeover]) -> None:
        """Remember a comparison, with where the ledgers of those who take over stand."""
        takeovers: list[JsonObject] = []
        for one in found:
            chain = self._saved(self._sweep.trial(one.trial), step).meta().get("chain")
            takeovers.append(
                {"trial": one.trial, "from": one.donor, "point": one.point, "chain": chain}
            )
        self._append({"step": step, "values": dict(values), "takeovers": takeovers})

    def settle(self, say: Callable[[str], None]) -> None:
        """Do what the last comparison says, unless that was done. Raises UserError where a
        checkpoint that it needs is not there."""
        lines = self._lines()
        if not lines or lines[-1].get("done"):
            return
        step = lines[-1]["step"]
        for one in self.takeovers():
            if one.step == step:
                trial, donor = self._sweep.trial(one.trial), self._sweep.trial(one.donor)
                point = ", ".join(f"{key} {value}" for key, value in one.point.items())
                say(f"step {step}: trial {trial.name} goes on from {donor.name} with {point}")
                with Ownership.take(self._sweep.run(trial), say):
                    self._take_over(one, trial, donor)
        self._append({"step": step, "done": True})

    def _append(self, line: JsonObject) -> None:
        lines = Lines(self._sweep.path / NAME)
        lines.write(line)
        lines.sync()
        lines.close()

    def _saved(self, trial: Trial, step: int) -> Saved:
        run = self._sweep.run(trial)
        return Saved(step, Catalogue.of(read_config(run).checkpoint, run).storage)

    def _take_over(self, one: Takeover, trial: Trial, donor: Trial) -> None:
        run = self._sweep.run(trial)
        config = read_config(run)
        source = self._saved(donor, one.step)
        # Its own chain and id: the ledger beside it stays, and goes on.
        meta = {**source.meta(), "chain": one.chain, "run": plans.identity(run), "from": donor.name}
        _replace(Catalogue.of(config.checkpoint, run), source, meta)
        theirs = Evaluations.load(self._sweep.run(donor))
        ours = Evaluations.load(run)
        ours.items = [item for item in ours.items if item.step < one.step]
        ours.items += [item for item in theirs.items if item.step == one.step]
        ours.save(run)
        _tell(run / "events.jsonl", one, donor)
        # Last: what the run is held against when it goes on.
        write_config(point_config(to_tree(config), one.point, str(run)), run)


def _replace(catalogue: Catalogue, source: Saved, meta: JsonObject) -> None:
    """Put a copy of `source` with this meta.json in the place of the checkpoint of its step, and
    take away those after it."""
    storage = catalogue.storage
    for saved in catalogue.committed():
        if saved.step >= source.step:
            storage.withdraw(saved.name, MARKER)
            storage.remove(saved.name)
    draft = storage.draft(source.name, f"taken.{time.time_ns()}")
    for name in meta["files"]:
        storage.copy(source.storage.where(f"{source.root}/{name}"), f"{draft}/{name}")
    content = json.dumps(meta).encode()
    storage.write(f"{draft}/meta.json", content)
    storage.publish(draft, source.name, MARKER, hashlib.sha256(content).hexdigest().encode())


def _tell(path: Path, one: Takeover, donor: Trial) -> None:
    """Into the run's events, once."""
    said = {"event": "taken_over", "step": one.step, "from": donor.name, "point": one.point}
    known = read_lines(path, {"event": str})
    if any(line["event"] == "taken_over" and line["step"] == one.step for line in known):
        return
    lines = Lines(path)
    lines.write({"time": round(time.time(), 3), **said})
    lines.close()


@dataclass(frozen=True)
class Stretch:
    """Steps after `begin` that were trained with `point`, in the run of `trial`."""

    begin: int
    trial: int
    point: Point


def lineage(trials: Sequence[Trial], taken: Sequence[Takeover], number: int) -> list[Stretch]:
    """How the weights of a trial came to be, from their first step on: those of the trials that
    were taken over from as well."""
    own = {trial.number: trial.point for trial in trials}
    found: list[Stretch] = []
    before = math.inf
    while True:
        mine = [one for one in taken if one.trial == number and one.step < before]
        last = max(mine, key=lambda one: one.step, default=None)
        if last is None:
            return [Stretch(0, number, own[number]), *found]
        found.insert(0, Stretch(last.step, number, last.point))
        number, before = last.donor, last.step
