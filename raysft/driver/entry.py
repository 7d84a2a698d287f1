"""What runs in the workers of a group: from Ray Train's call to the training loop and back.

`launch` hands over the settings; the monitor, on the driver's node, hears of everything that is to
be shown, counted or ended.
"""

from __future__ import annotations

import errno
import json
import logging
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
from raysft.run.evaluations import Evaluation, progress_of
from raysft.run.storage import write_whole
from raysft.train.watchdog import Orphaned

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from raysft.parallel import World
    from raysft.worker import Data, Read

Progress = Callable[[JsonObject], None]


def work(settings: Settings) -> None:
    """What each Ray Train worker runs, at every (re)start."""
    monitor = settings["monitor"]
    if ray.get(monitor.ended.remote()):
        return  # started again after a mistake that no restart mends
    try:
        _train_or_evaluate(settings, monitor)
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

    config, world = join(settings, Path(settings["folder"]) if is_main else None)
    group, begun = world.share((group, begun))
    if "end" in begun:
        return  # failed too often; the driver says so
    time.sleep(begun.get("pause_s", 0.0))
    here = ray.get_runtime_context().get_node_id()
    data_cpus = _data_cpus(settings, world.gather(here)) / world.size

    def reader(split: str, budget: int, seed: int | None) -> Read | None:
        return _reader(settings, split, budget, seed, data_cpus)

    data = worker.Data(
        examples=settings.get("examples", 0),
        eval=Index.load(settings["eval"][0][0]) if settings["eval"] else None,
        encoder=ray.get(settings["encoder"]),
        read_train=reader("train", config.data.budget, config.run.seed),
        read_eval=reader("eval", config.evaluate.tokens_per_batch, None),
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
    if "evaluated" in settings:
        _evaluate(config, settings, world, data, progress)
        return
    job = worker.build_job(config, folder, world, data, settings["total_steps"], progress)
    if world.is_main and not begun:
        progress({"summary": [*settings["summary"], worker.describe(job)]})
    say("waiting for the first batch")
    job.submitted = None if begun else settings["submitted"]
    job.start = {**job.start, "nodes": nodes, **begun}

    def told(reason: str) -> None:
        ray.get(monitor.failed.remote(f"worker {world.rank}: {reason}", first=True))

    job.hung = told
    job.signal = Signal(monitor) if world.is_main else job.signal
    job.lease = replace(settings["lease"], group=group)
    orphaned = Orphaned(job.lease, settings["driver"], told)
    try:
        train(job)
    finally:
        orphaned.close()


def _evaluate(
    config: Config, settings: Settings, world: World, data: Data, progress: Progress
) -> None:
    """Evaluate the checkpoint that `settings` name, into the evaluation's own folder."""
    from raysft.worker import build_evaluator, evaluate_checkpoint

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
