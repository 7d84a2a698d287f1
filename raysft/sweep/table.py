"""What a sweep came to: a row a trial, the best first; results.csv and best.yaml."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import yaml

from raysft.config import Config
from raysft.config.overrides import Dumper, set_key
from raysft.json_types import Json, JsonObject
from raysft.run.evaluations import figures
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from raysft.run.storage import write_whole
from raysft.scorers import figure_of
from raysft.sweep.folder import State, SweepFolder, Trial, trial_tree
from raysft.sweep.population import Population, lineage
from raysft.sweep.space import Point

SHOWN = 12  # rows in the terminal


@dataclass(frozen=True)
class Row:
    """A trial and how it ended. value: of the metric in its last evaluation; of the point: the mean
    over its seeds that have one. step: it was trained to. point: what it ended with; taken_over:
    when from whom (sweep.scheduler: pbt), "" for never."""

    trial: Trial
    state: State
    step: int
    value: float | None
    of_point: float | None
    figures: dict[str, float]
    seconds: float
    point: Point
    taken_over: str = ""


def rows(sweep: SweepFolder, metric: str, mode: str) -> list[Row]:
    """All trials, the best first: finished ones, then those that were ended early by how far they
    came, then the rest."""
    sign = 1.0 if mode == "min" else -1.0
    trials = sweep.trials()
    population = Population(sweep)
    taken, last = population.takeovers(), population.points(trials)
    names = {trial.number: trial.name for trial in trials}
    found = []
    for trial in trials:
        own = [f"step {o.step} from {names[o.donor]}" for o in taken if o.trial == trial.number]
        row = _row(sweep, trial, metric)
        found.append(replace(row, point=last[trial.number], taken_over="; ".join(own)))
    by_point: dict[int, list[float]] = {}
    for row in found:
        if row.value is not None:
            by_point.setdefault(row.trial.point_number, []).append(row.value)
    found = [
        replace(row, of_point=fmean(values) if values else None)
        for row in found
        for values in [by_point.get(row.trial.point_number)]
    ]

    def order(row: Row) -> tuple[float, ...]:
        finished = row.state.status == "finished"
        worth = math.inf if row.of_point is None else sign * row.of_point
        return (not finished, 0 if finished else -row.step, worth, row.trial.number)

    return sorted(found, key=order)


def _row(sweep: SweepFolder, trial: Trial, metric: str) -> Row:
    lines = [line for line in sweep.evaluations(trial) if metric in line]
    last = lines[-1] if lines else {}
    value = last.get(metric)
    if value is not None and not math.isfinite(value):
        value = None
    steps = read_lines(sweep.run(trial) / "metrics.jsonl", {"step": int})
    step = max([line["step"] for line in (*steps, *lines)], default=0)
    seconds = sum(line.get("seconds", 0.0) for line in steps)
    found = figures(last)
    return Row(trial, sweep.state(trial), step, value, None, found, seconds, trial.point)


def best(found: list[Row]) -> Row | None:
    """The trial that the sweep recommends: the first that finished with a figure."""
    good = (row for row in found if row.state.status == "finished" and row.value is not None)
    return next(good, None)


def write_csv(path: Path, found: list[Row], metric: str) -> None:
    """A row a trial; columns: rank, trial, status, step, the metric, its mean over seeds, all other
    figures, the point's keys, seed, seconds, attempts, folder, reason, and, where a trial went on
    from another's checkpoint, taken_over."""
    keys = list(found[0].point) if found else []
    taken = ["taken_over"] if any(row.taken_over for row in found) else []
    others = list(dict.fromkeys(name for row in found for name in row.figures if name != metric))
    text = io.StringIO()
    writer = csv.writer(text)
    titles = ["rank", "trial", "status", "step", metric, "mean_over_seeds"]
    titles += [*others, *keys, "seed", "seconds", "attempts", "folder", "reason", *taken]
    writer.writerow(titles)
    for rank, row in enumerate(found, 1):
        trial, state = row.trial, row.state
        point = [v if isinstance(v, str) else _text(v) for v in row.point.values()]
        writer.writerow(
            [rank, trial.name, state.status, row.step, _number(row.value), _number(row.of_point)]
            + [_number(row.figures.get(name)) for name in others]
            + [*point, trial.seed, f"{row.seconds:.1f}", state.attempts, f"trials/{trial.name}"]
            + [state.reason, *(row.taken_over for _ in taken)]
        )
    write_whole(path, text.getvalue().encode())


def _text(value: Json) -> str:
    return yaml.dump(value, Dumper=Dumper, default_flow_style=True).removesuffix("\n...\n").strip()


def _number(value: float | None) -> str:
    return "" if value is None else repr(value)


def write_best(path: Path, config: Config, sweep: SweepFolder, row: Row) -> None:
    """The config of a trial's run as a YAML file for jobs/sft.py: a run of its own, beside the
    sweep, with the same data, seed and keys. Where the trial went on from others' checkpoints a
    comment says with which values: those of the file are its last."""
    trial = row.trial
    tree: JsonObject = trial_tree(config, sweep, trial)
    tree["run"] = {
        "name": f"{config.run.name}_best",
        "storage_path": config.run.storage_path,
        "seed": trial.seed,
    }
    tree["log"]["group"] = config.log.group
    # Sums of another number of threads have other last bits.
    tree["parallel"]["threads"] = read_config(sweep.run(trial)).parallel.threads
    for key, value in row.point.items():
        set_key(tree, key, value)
    head = (
        f"# The best of the sweep {config.run.name}: trial {trial.name}\n{_stretches(sweep, row)}"
    )
    text = yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    write_whole(path, (head + text).encode())


def _stretches(sweep: SweepFolder, row: Row) -> str:
    """What a population's trial was trained with, step by step; "" where it never changed."""
    trials = sweep.trials()
    stretches = lineage(trials, Population(sweep).takeovers(), row.trial.number)
    if len(stretches) == 1:
        return ""
    names = {trial.number: trial.name for trial in trials}
    ends = [stretch.begin for stretch in stretches[1:]] + [row.step]
    lines = ["# It is another training than that trial's, which had other values before its last:"]
    for stretch, end in zip(stretches, ends):
        point = ", ".join(f"{key}: {_text(value)}" for key, value in stretch.point.items())
        lines.append(f"# steps {stretch.begin + 1} to {end}: {point} ({names[stretch.trial]})")
    return "\n".join(lines) + "\n"


def shown(found: list[Row], metric: str) -> str:
    """The table for a terminal, its best rows."""
    if not found:
        return "no trial was begun"
    keys = list(found[0].point)
    kind = figure_of(metric)
    lines = [["", "trial", metric, "step", *keys, ""]]
    for rank, row in enumerate(found[:SHOWN], 1):
        value = "-" if row.value is None else kind.shown(row.value)
        note = row.state.status + (f" ({row.state.reason[:60]})" if row.state.reason else "")
        point = [_text(value) for value in row.point.values()]
        lines.append([str(rank), row.trial.name[:4], value, str(row.step), *point, note])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in lines]
    if len(found) > SHOWN:
        text.append(f"... and {len(found) - SHOWN} more in results.csv")
    return "\n".join(line.rstrip() for line in text)
