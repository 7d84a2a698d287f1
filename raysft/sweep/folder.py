"""A sweep's folder, `run.storage_path/run.name`.

sweep.yaml     the config as resolved: what varies, and all that does not
trials.jsonl   a line a trial: its number, point and seed
trials/NAME/   a trial's run, a folder as any run's
states/NAME.json   how far it is: running, waiting (for others, at a step), finished, stopped (ended
                   early) or failed, and why
population.jsonl   of sweep.scheduler: pbt, see `sweep.population`
prepared/      what all trials begin with: the tokenizer of speech units, the prompts' template
results.csv    a row a trial, the best first
best.yaml      the best one's config, for jobs/sft.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from raysft import paths
from raysft.config import Config, changed_keys, to_tree, to_yaml
from raysft.config.load import read_tree, validate
from raysft.config.resume import rule_of
from raysft.errors import UserError
from raysft.json_types import Json, JsonObject
from raysft.run.catalogue import Catalogue
from raysft.run.folder import read_config
from raysft.run.lines import Lines, read_lines
from raysft.run.storage import write_whole
from raysft.sweep.space import Point

NAME, TRIALS, PREPARED = "sweep.yaml", "trials", "prepared"
STOPPING = "stopping"  # a file that tells trials to save and leave
LONGEST = 60  # characters of a point in a trial's name
# Another one is another sweep: points, or which trials were ended, would be others.
_ITS_OWN = ("space", "searcher", "seeds", "scheduler")

Status = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One point with one seed. number: in the order they were chosen, from 0. point_number: of the
    point, which several seeds have."""

    number: int
    point: Point
    point_number: int
    seed: int

    @property
    def name(self) -> str:
        """Of its run: 0003_r8_lr0.0001."""
        parts = [f"{key.rpartition('.')[2]}{_short(value)}" for key, value in self.point.items()]
        text = re.sub(r"[^-.\w]+", "-", "_".join(parts))[:LONGEST].rstrip("-_.")
        return f"{self.number:04d}_{text}"


@dataclass(frozen=True)
class State:
    """How far a trial is. attempts: starts of this and earlier commands; reason: of its end."""

    status: Status = "waiting"
    attempts: int = 0
    reason: str = ""


def _short(value: Json) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


class SweepFolder:
    """What is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def stopping(self) -> Path:
        """There, once trials are to save and leave."""
        return self.path / STOPPING

    def run(self, trial: Trial) -> Path:
        """The folder of a trial's run."""
        return self.path / TRIALS / trial.name

    def trials(self) -> list[Trial]:
        """All that were begun, in their order."""
        kinds = {"number": int, "point": dict, "point_number": int, "seed": int}
        found = [
            Trial(**{key: line[key] for key in kinds})
            for line in read_lines(self.path / "trials.jsonl", kinds)
        ]
        return sorted(found, key=lambda trial: trial.number)

    def trial(self, number: int) -> Trial:
        """The one with this number, which was begun."""
        (found,) = (trial for trial in self.trials() if trial.number == number)
        return found

    def add(self, trial: Trial) -> None:
        """Remember a trial that begins."""
        lines = Lines(self.path / "trials.jsonl")
        lines.write(asdict(trial))
        lines.close()

    def state(self, trial: Trial) -> State:
        """How far a trial is."""
        path = self._state(trial)
        if not path.is_file():
            return State()
        try:
            return State(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete it") from error

    def set_state(self, trial: Trial, **changes: object) -> State:
        """Change it, and write it down."""
        state = replace(self.state(trial), **changes)  # type: ignore[arg-type]
        path = self._state(trial)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(asdict(state)).encode())
        return state

    def _state(self, trial: Trial) -> Path:
        return self.path / "states" / f"{trial.name}.json"

    def evaluations(self, trial: Trial) -> list[JsonObject]:
        """Lines of its eval.jsonl, one a step, in their order."""
        lines = read_lines(self.run(trial) / "eval.jsonl", {"step": int})
        return sorted({line["step"]: line for line in lines}.values(), key=lambda one: one["step"])

    def reached(self, trial: Trial, step: int) -> bool:
        """Whether its run has saved and evaluated a step."""
        run = self.run(trial)
        if not (run / "config.yaml").is_file():
            return False
        newest, _ = Catalogue.of(read_config(run).checkpoint, run).newest()
        saved = newest is not None and newest.step >= step
        return saved and any(line["step"] == step for line in self.evaluations(trial))


def open_sweep(config: Config, folder: Path) -> SweepFolder:
    """The sweep of `config` in `folder`, which is made, or held against it.

    Raises UserError where a run is there, or another sweep.
    """
    written = folder / NAME
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: holds a run, no sweep; choose another run.name")
    folder.mkdir(parents=True, exist_ok=True)
    if written.is_file():
        _check_same(read_sweep(folder), config, folder)
    sweep = SweepFolder(folder)
    sweep.stopping.unlink(missing_ok=True)
    write_whole(written, to_yaml(config).encode())
    for name in (TRIALS, PREPARED):
        (folder / name).mkdir(exist_ok=True)
    return sweep


def read_sweep(folder: Path) -> Config:
    """The config of the sweep in `folder`. Raises UserError where there is none."""
    written = folder / NAME
    if not written.is_file():
        raise UserError(f"{folder}: no sweep is here (no {NAME}); name a sweep's folder")
    return validate(read_tree(written.read_text(encoding="utf-8"), str(written)), str(written))


def _check_same(before: Config, now: Config, folder: Path) -> None:
    old, new = (config.model_dump(mode="json") for config in (before, now))
    wrong = []
    for change in changed_keys(old, new):
        section, _, key = change.key.partition(".")
        if section == "sweep":
            key = key.partition(".")[0]
            fewer = key == "trials" and (now.sweep.trials or 0) < (before.sweep.trials or 0)
            other = key in _ITS_OWN or fewer
        else:
            other = section != "run" and rule_of(change.key).rule != "free"
            other = other or change.key == "run.seed"
        if other:
            wrong.append(str(change))
    intervals = [config.sweep.interval or config.evaluate.every for config in (before, now)]
    if now.sweep.scheduler == "pbt" and intervals[0] != intervals[1]:
        wrong.append(
            f"sweep.interval, by default evaluate.every (was {intervals[0]}, now {intervals[1]})"
        )
    if wrong:
        raise UserError(
            f"{folder}: holds another sweep: {'; '.join(wrong)}. Set these back to continue it, "
            "or choose another run.name"
        )


def trial_tree(config: Config, folder: SweepFolder, trial: Trial, **keys: Json) -> JsonObject:
    """The tree of the config of a trial's run; keys: others to be set, `section__key`."""
    tree = to_tree(config)
    del tree["sweep"]
    tree["run"] = {
        "name": trial.name,
        "storage_path": str(folder.path / TRIALS),
        "seed": trial.seed,
    }
    tree["log"]["group"] = tree["log"]["group"] or config.run.name
    if tree["data"]["index_path"] is None:  # made once for all
        tree["data"]["index_path"] = str(Path(paths.absolute(config.run.storage_path)) / "index")
    for key, value in keys.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return tree


def seeded(number: int, point: Point, seeds: int, seed: int) -> Iterator[Trial]:
    """The trials of the point with this number. seed: run.seed of the first."""
    for offset in range(seeds):
        yield Trial(number * seeds + offset, point, number, seed + offset)
