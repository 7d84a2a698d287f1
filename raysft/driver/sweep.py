"""A sweep: its trials under Ray Tune, each a run of its own, and the table of what they came to.

Tune chooses which trial runs when, and which ends early; what a trial is, is in `driver.trial`,
and the state of all is the sweep's folder. Started again, the trials that were begun are told to
Tune again from what their runs have written: finished ones at once, others train on.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    TrialScheduler,
)
from ray.tune.search import Searcher

from raysft.config import Config
from raysft.config.load import validate
from raysft.data.clips import speech_tokens
from raysft.driver import growing, preflight
from raysft.driver.group import interruptible
from raysft.driver.launch import Progress
from raysft.driver.population import Generations
from raysft.driver.searcher import Trials
from raysft.driver.shares import Shares
from raysft.driver.trial import Tuned
from raysft.errors import UserError, first_line
from raysft.json_types import JsonObject
from raysft.loggers import check as loggers
from raysft.page.live import write_page
from raysft.run.evaluations import metrics_of
from raysft.run.folder import run_folder
from raysft.run.ownership import Ownership
from raysft.scorers import figure_of
from raysft.sweep import population, table
from raysft.sweep.choose import Chooser, Listed, Optuna
from raysft.sweep.folder import PREPARED, SweepFolder, Trial, open_sweep, trial_tree
from raysft.sweep.live import Live
from raysft.sweep.space import (
    Dimension,
    check_size,
    point_config,
    points,
    read_space,
    searcher_of,
)

log = logging.getLogger(__name__)

# What Tune would write beside: a trial's figures are in its run's folder.
_TUNE = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}


@dataclass
class Swept:
    """How a sweep ended."""

    folder: Path
    metric: str
    rows: list[table.Row]

    def describe(self) -> str:
        """What the user sees at the end."""
        text = table.shown(self.rows, self.metric)
        best = table.best(self.rows)
        if best is None:
            return f"{text}\nno trial has finished with a figure\nsweep folder: {self.folder}"
        where = f"best: {best.trial.name}, as a config: {self.folder / 'best.yaml'}"
        return f"{text}\n{where}\nsweep folder: {self.folder}"


def check(config: Config) -> list[Dimension]:
    """Look for mistakes that show without data or a cluster; returns the space's dimensions.

    Raises UserError.
    """
    sweep = config.sweep
    if config.stages:
        raise UserError(
            "stages: a sweep tries values for one training; leave stages out, or train with sft"
        )
    dimensions = read_space(config)
    check_size(sweep, dimensions)
    if not config.data.eval or not (config.evaluate.at_end or config.evaluate.every):
        raise UserError(
            "sweep: trials are ranked by an evaluation, and there is none: set data.eval and "
            "evaluate.at_end"
        )
    if sweep.scheduler != "none" and not config.evaluate.every:
        raise UserError(
            f"sweep.scheduler: {sweep.scheduler} compares trials while they train: set "
            "evaluate.every, the steps between two evaluations"
        )
    if sweep.scheduler == "pbt":
        population.check(config, dimensions)
    tree = trial_tree(config, SweepFolder(run_folder(config)), Trial(0, {}, 0, config.run.seed))
    if searcher_of(sweep, dimensions) != "optuna":
        for number, point in enumerate(points(sweep, dimensions, config.run.seed)):
            point_config(tree, point, f"sweep.space, point {number} ({point})")
    return dimensions


def run(config: Config, progress: Progress) -> Swept:
    """Begin, or continue, the sweep of `config`; returns its table, and writes results.csv and
    best.yaml. Raises UserError; KeyboardInterrupt or SystemExit after its trials have saved."""
    dimensions = check(config)
    folder = run_folder(config)

    say = preflight.saying(progress)

    with Ownership.take(folder, say) as owner:
        sweep = open_sweep(config, folder)
        base = trial_tree(config, sweep, Trial(0, {}, 0, config.run.seed))
        metric, mode, steps = _prepare(config, sweep, base, say)
        at_once = _shares(config, dimensions, base, say)
        say(f"{at_once} trial(s) at a time")
        try:
            _tune(config, sweep, dimensions, base, (metric, mode), steps, at_once, progress, owner)
        finally:
            shutil.rmtree(folder / "tune", ignore_errors=True)
            found = table.rows(sweep, metric, mode)
            table.write_csv(folder / "results.csv", found, metric)
            if (best := table.best(found)) is not None:
                table.write_best(folder / "best.yaml", config, sweep, best)
            if found:
                write_page(folder)
    return Swept(folder, metric, found)


def _prepare(
    config: Config, sweep: SweepFolder, base: JsonObject, say: preflight.Say
) -> tuple[str, str, int]:
    """What is made once for all trials; returns metric, mode, and the last step. Adds to `base`."""
    trial = validate(base, "sweep")
    if trial.data.tokens_per_batch == "auto":
        raise UserError(
            "data.tokens_per_batch: auto is found for one run, and trials have to be alike: set "
            "the number (--dry-run of jobs/sft.py tells what one finds)"
        )
    units = trial.data.speech_tokens
    if units is not None and units.path is None:
        base["data"]["speech_tokens"]["path"] = str(sweep.path / PREPARED / speech_tokens.FILE_NAME)
        trial = validate(base, "sweep")
    prepared = preflight.prepare(trial, sweep.path / PREPARED, None, say)
    assert prepared.eval is not None  # `check` has seen to it
    given = metrics_of(prepared.eval, config.evaluate, config.train.objective)
    metric = config.sweep.metric
    if metric not in given:
        kinds = [name for name in given if name.partition("/")[0] == metric]
        if not kinds:
            raise UserError(
                f"sweep.metric: {metric} is not measured; an evaluation on data.eval gives "
                f"{', '.join(given) or 'nothing'}"
            )
        metric = kinds[0]
    return metric, config.sweep.mode or figure_of(metric).better, prepared.total_steps


@dataclass(frozen=True)
class Need:
    """What a trial takes of the cluster, at least. workers: with those that evaluate meanwhile."""

    workers: int
    each: float  # CPUs of a worker
    data: float  # CPUs

    @classmethod
    def of(cls, config: Config) -> Need:
        """Of a trial's config."""
        each = config.parallel.cpus_per_worker or 1.0
        workers = config.parallel.max_workers + config.evaluate.apart
        return cls(workers, each, float(config.data.cpus or 1))

    @property
    def cpus(self) -> float:
        """In all."""
        return self.workers * self.each + self.data


def _shares(
    config: Config, dimensions: list[Dimension], base: JsonObject, say: preflight.Say
) -> int:
    """How many trials run at a time; in `base`, what each gets of the cluster is then set.

    Raises UserError where not even one has room, nor will have.
    """
    one = validate(base, "sweep")
    growing.wait(one, say)
    ones = [one]
    for dimension in dimensions:
        if dimension.key in ("data.cpus", "data.nodes") or dimension.key.startswith("parallel."):
            ones += [point_config(base, {dimension.key: v}, "sweep") for v in dimension.ends()]
    shares = [Shares.of(each) for each in ones]
    total = ray.cluster_resources()
    cpus = total.get("CPU", 1.0)
    need = max(map(Need.of, ones), key=lambda found: found.cpus)
    grows = growing.Autoscaler.now().grows
    given = any(each.parallel.cpus_per_worker is not None for each in ones)
    if need.cpus > cpus and given and not grows:
        raise UserError(
            f"parallel.cpus_per_worker: a trial needs {need.workers} x {need.each:g} CPUs and "
            f"{need.data:g} for data, and the cluster has {cpus:g}; use fewer workers, or less "
            "for each"
        )
    room = int(cpus / need.cpus)
    gpu = any(each.gpu for each in shares)
    if gpu:
        room = min(room, int(total["GPU"] / need.workers))
    asked = config.sweep.max_concurrent
    if grows:
        return asked or max(1, room)
    room = max(1, room)
    at_once = min(asked or room, room)
    if asked is not None and asked > room:
        say(
            f"sweep.max_concurrent: {asked}, but the cluster has room for {room} trial(s) of "
            f"{need.workers} worker(s) at a time"
        )
    share, data = cpus / at_once, need.data
    if one.data.cpus is None:
        free = share - need.workers * need.each if gpu else share / 4
        base["data"]["cpus"] = data = max(1, int(free))
    if not gpu:
        each = (share - data) / need.workers
        if one.parallel.cpus_per_worker is None and not one.parallel.elastic:
            base["parallel"]["cpus_per_worker"] = max(0.01, min(1.0, each))
        if one.parallel.threads is None:
            base["parallel"]["threads"] = max(1, int(each))
    return at_once


def _tune(
    config: Config,
    sweep: SweepFolder,
    dimensions: list[Dimension],
    base: JsonObject,
    ranked: tuple[str, str],
    steps: int,
    at_once: int,
    progress: Progress,
    owner: Ownership,
) -> None:
    metric, mode = ranked
    for key, value in _TUNE.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    search: Searcher
    if config.sweep.scheduler == "pbt":
        search = Generations(config, sweep, dimensions, mode, steps, progress)
    else:
        chooser = _chooser(config, dimensions, mode)
        search = Trials(sweep, chooser, config.sweep.seeds, config.run.seed)
    grace_s = validate(base, "sweep").checkpoint.grace_s
    node = f"node:{ray.util.get_node_ip_address()}"
    live = Live(sweep, metric, mode)
    trainable = tune.with_parameters(
        Tuned,
        tree=base,
        folder=str(sweep.path),
        metric=metric,
        mode=mode,
        grace_s=grace_s,
        credentials=loggers.credentials(config.log),
    )
    tuner = tune.Tuner(
        # On this node: while this process lives, so do its trials, whatever other nodes are lost.
        # A trial that held a CPU would take it from its workers.
        tune.with_resources(trainable, {node: 0.0001}),
        tune_config=tune.TuneConfig(
            metric="figure",
            mode=mode,
            search_alg=search,
            scheduler=_scheduler(config, steps),
            num_samples=-1,
            max_concurrent_trials=at_once,
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name=f"tune_{time.strftime('%Y%m%d_%H%M%S')}",
            storage_path=str(sweep.path / "tune"),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=config.sweep.retries),
            callbacks=[Told(sweep, metric, progress, live)],
        ),
    )

    def leave() -> bool:
        sweep.stopping.touch()
        return True

    try:
        interruptible(tuner.fit, leave, grace_s + 30.0, owner)
    except (KeyboardInterrupt, SystemExit) as error:
        done = sum(sweep.state(trial).status == "finished" for trial in sweep.trials())
        text = f"interrupted; {done} trial(s) are finished; the same command continues the sweep"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(text) from None
        raise
    except tune.TuneError as error:
        raise UserError(f"the sweep cannot go on: {first_line(error)}") from error
    finally:
        live.close()


def _chooser(config: Config, dimensions: list[Dimension], mode: str) -> Chooser:
    sweep, seed = config.sweep, config.run.seed
    if searcher_of(sweep, dimensions) == "optuna":
        return Optuna(dimensions, sweep.trials or 0, mode, seed)
    return Listed(points(sweep, dimensions, seed))


def _scheduler(config: Config, steps: int) -> TrialScheduler:
    sweep = config.sweep
    grace = sweep.grace or config.evaluate.every
    if sweep.scheduler == "asha":
        # One more than there are: a trial ends by itself.
        return ASHAScheduler(
            time_attr="step",
            max_t=max(steps, grace) + 1,
            grace_period=grace,
            reduction_factor=sweep.reduction,
        )
    return FIFOScheduler()


class Told(tune.Callback):
    """Shows what trials do, one line each, and sees to the sweep's page."""

    def __init__(self, sweep: SweepFolder, metric: str, progress: Progress, live: Live) -> None:
        self._sweep, self._metric, self._progress, self._live = sweep, metric, progress, live

    def _say(self, trial: tune.experiment.Trial, text: str) -> None:
        name = self._sweep.trial(trial.config["number"]).name
        self._progress({"doing": f"trial {name}: {text}"})

    def on_trial_start(
        self, iteration: int, trials: list, trial: tune.experiment.Trial, **info: object
    ) -> None:
        """See Tune's Callback."""
        until = trial.config.get("until", 0)
        self._say(trial, f"trains to step {until}" if until else "begins")

    def on_trial_result(
        self,
        iteration: int,
        trials: list,
        trial: tune.experiment.Trial,
        result: JsonObject,
        **info: object,
    ) -> None:
        """See Tune's Callback."""
        self._live.new()
        if not result["done"]:
            shown = figure_of(self._metric).shown(result["figure"])
            self._say(trial, f"step {result['step']}: {self._metric} {shown}")

    def on_trial_complete(
        self, iteration: int, trials: list, trial: tune.experiment.Trial, **info: object
    ) -> None:
        """See Tune's Callback."""
        self._live.new()
        if not trial.config.get("until", 0):
            self._say(trial, "ends")

    def on_trial_error(
        self, iteration: int, trials: list, trial: tune.experiment.Trial, **info: object
    ) -> None:
        """See Tune's Callback."""
        self._live.new()
        state = self._sweep.state(self._sweep.trial(trial.config["number"]))
        self._say(trial, f"failed ({state.attempts} attempts): {state.reason}")
