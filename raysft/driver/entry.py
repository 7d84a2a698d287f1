"""What runs in the workers of a group: from Ray Train's call to the training loop and back.

`launch` hands over the settings; the monitor, on the driver's node, hears of everything that is to
be shown, counted or ended.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import ray.train

from raysft import failures, patience, plugins
from raysft.config import Config
from raysft.data.index.build import Index
from raysft.data.plan.generations import open_index
from raysft.data.read.stream import RayReader, ReaderSpec
from raysft.driver.group import Settings, join
from raysft.driver.readers import Readers
from raysft.json_types import JsonObject
from raysft.loggers import check as loggers
from raysft.run.evaluations import Evaluation, Made, Measure, left, predictions_of, progress_of
from raysft.run.storage import write_whole
from raysft.train.watchdog import EXIT_CODE, Orphaned

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from raysft.parallel import World
    from raysft.worker import Data, Hear, Read

Progress = Callable[[JsonObject], None]

GENTLY_S = 5.0
LOOK_S = 0.5
OVER_S = 60.0


def trains(settings: Settings) -> bool:
    """Whether these are of a group that trains, not of one that evaluates."""
    return "evaluated" not in settings


def work(settings: Settings) -> None:
    """What each Ray Train worker runs, at every (re)start."""
    monitor = settings["monitor"]
    if ray.get(monitor.ended.remote()):
        return  # started again after a mistake that no restart mends
    try:
        _train_or_evaluate(settings, monitor)
    except Unwanted:
        return
    except Exception as error:
        said = _final(error, monitor, settings["folder"])
        if said is not None:
            ray.get(monitor.mistake.remote(said, failures.full(error)))
            # Raising ends the other workers too. The driver prints the message: no traceback here.
            logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise


def _final(error: Exception, monitor: ActorHandle, folder: str) -> str | None:
    """What the run ends with, where `error` is one that no restart mends; else None."""
    found = failures.root(error)
    if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        where = found.filename or folder
        return f"{where}: cannot be written: {found.strerror}; make room, then start again"
    if failures.certain(error):
        return failures.told(error)
    name = failures.repeats(error)
    if name is not None and ray.get(monitor.again.remote(name)):
        return f"{failures.told(error)}; it came again, at the same place, when started again"
    return None


def _train_or_evaluate(settings: Settings, monitor: ActorHandle) -> None:
    # First of all, so that whatever ends this group from here on counts as its failure.
    context = ray.train.get_context()
    is_main, size = context.get_world_rank() == 0, context.get_world_size()
    group, begun = ray.get(monitor.enter.remote(size)) if is_main else (0, {})
    from raysft import worker  # here, not above: the driver has no use for models
    from raysft.train.loop import train

    logs = is_main and "training" not in settings.get("evaluated", {})  # else they are training's
    config, world = join(settings, Path(settings["folder"]) if logs else None)
    group, begun = world.share((group, begun))
    if "end" in begun:
        return  # failed too often; the driver says so
    time.sleep(begun.get("pause_s", 0.0))
    here = ray.get_runtime_context().get_node_id()
    data_cpus = _data_cpus(settings, world.gather(here)) / world.size

    def reader(split: str, budget: int, seed: int | None) -> Read | None:
        return _reader(settings, split, budget, seed, data_cpus)

    if "credentials" in settings:
        loggers.take(ray.get(settings["credentials"]))
    data = worker.Data(
        examples=settings.get("examples", 0),
        eval=Index.load(settings["eval"][0][0]) if settings["eval"] else None,
        encoder=ray.get(settings["encoder"]),
        read_train=reader("train", config.data.budget, config.run.seed),
        read_eval=reader("eval", config.evaluate.tokens_per_batch, None),
        hear=_hear(config),
    )
    names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
    nodes = sorted(set(world.gather(names[here])))

    def progress(line: JsonObject) -> None:
        monitor.report.remote(line)

    def say(text: str) -> None:
        if world.is_main:
            progress({"doing": text})

    if world.is_main:
        progress({"workers": world.size, "nodes": nodes})
    say("building the model" if config.model.path is None else f"loading {config.model.path}")
    folder = Path(settings["folder"])
    if not trains(settings):
        _evaluate(config, settings, world, data, progress)
        return
    job = worker.build_job(config, folder, world, data, settings["total_steps"], progress)
    if world.is_main and not begun:
        progress({"summary": [*settings["summary"], worker.describe(job)]})
    say("waiting for the first batch")
    job.submitted, job.until = None if begun else settings["submitted"], settings["until"]
    job.start = {**job.start, "nodes": nodes, **begun}

    def told(reason: str) -> None:
        ray.get(monitor.failed.remote(f"worker {world.rank}: {reason}", first=True))

    job.hung = told
    job.signal = Signal(monitor) if world.is_main else job.signal
    job.beside = Beside(monitor) if world.is_main and config.evaluate.apart else None
    job.lease = replace(settings["lease"], group=group)
    orphaned = Orphaned(job.lease, settings["driver"], told)
    try:
        train(job)
    finally:
        orphaned.close()


def _hear(config: Config) -> Hear | None:
    if not config.evaluate.speaks:
        return None
    from raysft.hearing.run import hear

    return hear


def _evaluate(
    config: Config, settings: Settings, world: World, data: Data, progress: Progress
) -> None:
    """Evaluate the checkpoint that `settings` name, into the evaluation's own folder; or those, for
    the training that goes on meanwhile."""
    from raysft.worker import build_evaluator, evaluate_checkpoint

    if "training" in settings["evaluated"]:
        _evaluate_beside(config, settings, world, data)
        return

    def tell(reason: str) -> None:
        progress({"event": "warning", "reason": reason})

    folder, about = Path(settings["folder"]), settings["evaluated"]
    evaluator = build_evaluator(config, Path(about["run"]), world, data)
    predictions = folder / "predictions.jsonl"
    seen = progress_of(progress if world.is_main else None)
    values = evaluate_checkpoint(evaluator, about["step"], predictions, seen, tell)
    if world.is_main:
        measure = evaluator.evaluate.measure(True)
        line = Evaluation(about["step"], values, measure, final=True).line(checkpoint=True)
        write_whole(folder / "eval.jsonl", (json.dumps(line, ensure_ascii=False) + "\n").encode())


def _evaluate_beside(config: Config, settings: Settings, world: World, data: Data) -> None:
    """Evaluate checkpoints of the run as they come, the oldest first; training records it."""
    from raysft.worker import build_evaluator, evaluate_checkpoint

    folder, about = Path(settings["folder"]), settings["evaluated"]
    training, lease, monitor = about["training"], settings["lease"], settings["monitor"]

    def told(reason: str) -> None:
        ray.get(monitor.failed.remote(f"worker {world.rank}: {reason}", first=True))

    orphaned = Orphaned(lease, settings["driver"], told)
    ending = Ending(monitor)
    try:
        evaluator = build_evaluator(config, folder, world, data)
        measure = evaluator.evaluate.measure(False)
        due = Due(folder, config, measure, about)
        while True:
            step, ended = world.share(
                (due.next(), ending.ended) if world.is_main else (None, False)
            )
            if ended:
                return
            if step is None:
                time.sleep(LOOK_S)
                continue
            predictions = predictions_of(folder, step, f"{lease.name}.beside")
            warnings: list[str] = []
            values = evaluate_checkpoint(
                evaluator, step, predictions, ending.seen, warnings.append, final=False
            )
            if world.is_main:
                found = Evaluation(step, values, measure)
                ray.get(training.made.remote(Made(step, found, warnings, predictions)))
                monitor.report.remote({"event": "saved", "step": step})  # it gets on
    finally:
        ending.close()
        orphaned.close()


class Due:
    """Which checkpoint is to be evaluated beside training: the oldest of those that are left."""

    def __init__(self, folder: Path, config: Config, measure: Measure, about: Settings) -> None:
        self._folder, self._config, self._measure = folder, config, measure
        self._total = about["total_steps"]
        self._training, self._looked = about["training"], -1

    def next(self) -> int | None:
        """Tells training that it is evaluated now; None: there is none yet."""
        saves = ray.get(self._training.saves.remote())
        if saves == self._looked:
            return None
        given = ray.get(self._training.tried.remote())
        steps = left(self._folder, self._config, self._total, self._measure, given)
        if not steps:
            self._looked = saves
            return None
        ray.get(self._training.trying.remote(steps[0]))
        self._training.report.remote({"doing": f"evaluating step {steps[0]} beside training"})
        return steps[0]


class Unwanted(Exception):
    """What this worker does is of no use any more: nothing has failed."""


class Ending:
    """Ends this worker when the driver wants its evaluation no more: between two batches, or, where
    that takes longer than `GENTLY_S`, with its process."""

    def __init__(self, monitor: ActorHandle) -> None:
        self._monitor, self.ended = monitor, False
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="ending").start()

    def seen(self, done: int, total: int) -> None:
        """Called before each round of batches. Raises Unwanted."""
        if self.ended:
            raise Unwanted

    def close(self) -> None:
        """It has ended."""
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            try:
                self.ended = ray.get(self._monitor.ended.remote()) is not None
            except ray.exceptions.RayError:  # the driver is gone
                self.ended = True
            if self.ended:
                if not self._stop.wait(GENTLY_S):
                    os._exit(EXIT_CODE)
                return


class Beside:
    """See `job.Beside`: the monitor has what was made."""

    def __init__(self, monitor: ActorHandle) -> None:
        self._monitor, self._found = monitor, list[Made]()
        self._asked = monitor.unrecorded.remote()

    def ready(self) -> int:
        if not self._found and ray.wait([self._asked], timeout=0)[0]:
            self._found = ray.get(self._asked)
            if not self._found:
                self._asked = self._monitor.unrecorded.remote()
        return len(self._found)

    def made(self) -> list[Made]:
        return self._found

    def recorded(self, step: int) -> None:
        self._monitor.recorded.remote(step)
        self._found = [made for made in self._found if made.step != step]
        if not self._found:  # asked after that was said
            self._asked = self._monitor.unrecorded.remote()

    def end(self, waiting: Callable[[], None]) -> None:
        """No longer than `OVER_S`: where the group cannot be ended, what it makes is not taken."""
        ray.get(self._monitor.alone.remote())
        begun = time.monotonic()
        while not ray.get(self._monitor.is_over.remote()) and time.monotonic() - begun < OVER_S:
            waiting()
            time.sleep(0.2)
        self._found = ray.get(self._monitor.unrecorded.remote())


class Signal:
    """The monitor's signal as of a moment ago, without waiting for it."""

    def __init__(self, monitor: ActorHandle) -> None:
        self._monitor, self._asked, self._value = monitor, monitor.signal.remote(), 0

    def __call__(self) -> int:
        ready, _ = ray.wait([self._asked], timeout=0)
        if ready:
            self._value = ray.get(self._asked)
            self._asked = self._monitor.signal.remote()
        return self._value


def _data_cpus(settings: Settings, workers: list[str]) -> float:
    """Of all workers' data tasks. workers: the node of each.

    Workers may hold every CPU of a small cluster: data tasks then ask for none, and share.
    """
    readers: Readers = settings["readers"]
    cpus = readers.cpus()
    if readers.grows or (readers.selector() and not cpus):
        return settings["data_cpus"]  # nodes that are yet to come
    held = settings["worker_cpus"] * sum(worker in cpus for worker in workers)
    held += 0.0 if readers.selector() else settings["other_cpus"]
    return max(0.0, min(settings["data_cpus"], sum(cpus.values()) - held))


def _reader(
    settings: Settings,
    split: str,
    budget: int,
    seed: int | None,
    cpus: float,
) -> Read | None:
    places = settings.get(split)
    if places is None:
        return None
    known = (patience.allowed(), plugins.loaded())
    spec = ReaderSpec(places, settings["encoder"], budget, seed, *known)
    readers: Readers = settings["readers"]
    seconds = open_index(places).seconds
    return RayReader(spec, seconds, cpus, readers.selector(), readers.elsewhere).read
