"""Config -> a running job: index and plan on the driver, Ray Train workers, one outcome.

prepare   encoder, index, plan (see `prepare`)
train     TorchTrainer with restarts; every worker runs `train.loop.train` on its lanes
outcome   where the run's folder is and what the last evaluation said
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysft import history
from raysft.config import Config
from raysft.data.example import Quarantined
from raysft.data.generations import open_index
from raysft.data.index import Index
from raysft.data.plan import Cursor
from raysft.data.stream import RayReader, ReaderSpec
from raysft.errors import UserError
from raysft.prepare import Prepared, prepare
from raysft.rundir import open_run
from raysft.train.catalogue import Catalogue
from raysft.train.metrics import Lines, quarantine_line, read_lines
from raysft.train.monitor import LEAVE, SAVE, Monitor

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]
RESIZE_EVERY_S = 10.0  # how often an elastic run looks for nodes that came
ROOM_WITHIN_S = 10.0


@dataclass
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    evaluation: dict[str, float]

    def describe(self) -> str:
        """What the user sees at the end."""
        lines = [f"{name:<24} {_figure(name, value)}" for name, value in self.evaluation.items()]
        return "\n".join([*lines, f"run folder: {self.folder} (step {self.step})"])


def run(config: Config, progress: Progress, task: str = "train") -> Outcome:
    """Train (or continue) the run, or with task="evaluate" evaluate its newest checkpoint.

    Ctrl-C and SIGTERM, while training: saves, then raises KeyboardInterrupt or SystemExit.
    """
    folder = open_run(config)
    catalogue = Catalogue.of(config.checkpoint, folder)
    saved, _ = catalogue.newest()
    cursor = Cursor.from_json(saved.meta()["cursor"]) if saved else None
    prepared = prepare(config, folder, cursor, train=task == "train")
    if task == "evaluate":
        if saved is None:
            raise UserError(f"{folder}: no committed checkpoint to evaluate; train first")
        if prepared.eval is None:
            raise UserError("data.eval: empty; name a source, e.g. --data test.jsonl")
    _record_rejected(folder, prepared.rejected)
    if saved is not None:
        print(f"continuing {folder} from step {saved.step}", flush=True)
    # On this node: while the driver lives, so does the monitor, whatever other nodes are lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = (
        ray.remote(Monitor)
        .options(num_cpus=0, scheduling_strategy=here)
        .remote(config.parallel.max_failures, config.parallel.backoff_s)
    )
    watch = Watch(monitor, progress)
    try:
        _fit(prepared, folder, monitor, task)
        failure = ray.get(monitor.ended.remote())
        if failure:
            raise UserError(failure)
    except UserError as error:
        with contextlib.suppress(OSError):  # a full disk is what it may be about
            events = Lines(folder / "events.jsonl")
            events.write({"time": round(time.time(), 3), "event": "failed", "reason": str(error)})
            events.close()
        raise
    finally:
        watch.close()
    lines = read_lines(folder / "eval.jsonl")
    evaluation = {k: v for k, v in lines[-1].items() if k != "step"} if lines else {}
    saved, _ = catalogue.newest()
    return Outcome(folder, saved.step if saved else 0, evaluation)


def _fit(prepared: Prepared, folder: Path, monitor: Any, task: str) -> None:
    config = prepared.config
    shares = Shares.of(config)
    # Ray's own watch over workers sees one that is frozen; `Watchdog` one whose thread is.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(config.parallel.timeout_s))
    # How long to wait for room for all workers. An elastic run asks for as many as there seems to
    # be room for, a moment after a node was lost for too many: soon it has to count again.
    elastic = config.parallel.elastic
    os.environ.setdefault(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(ROOM_WITHIN_S) if elastic else "300"
    )
    settings = {
        "config": config.model_dump(mode="json"),
        "folder": str(folder),
        "train": tuple(history.places(folder)),
        "eval": ((str(prepared.eval.folder), len(prepared.eval)),) if prepared.eval else None,
        "encoder": ray.put(prepared.encoder),
        "total_steps": prepared.total_steps,
        "examples": len(prepared.train) + len(prepared.train.rejected),
        "threads": shares.threads,
        "data_cpus": shares.data_cpus,
        "worker_cpus": shares.per_worker["CPU"],
        "task": task,
        "monitor": monitor,
    }
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config=settings,
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if shares.gpu else "gloo", timeout_s=int(config.parallel.timeout_s)
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(config.parallel.min_workers, config.parallel.max_workers)
            if elastic
            else config.parallel.max_workers,
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
            use_gpu=shares.gpu,
            resources_per_worker=shares.per_worker,
            placement_strategy="SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=f"start_{time.strftime('%Y%m%d_%H%M%S')}_{uuid.uuid4().hex[:6]}",
            storage_path=str(folder / "ray_train"),
            worker_runtime_env={"env_vars": _thread_settings(shares)},
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            callbacks=[Failures(monitor)],
            # Monitor counts failures, for it knows whether the run gets on between them.
            failure_config=ray.train.FailureConfig(
                max_failures=-1,
                max_preemption_failures=-1,
                controller_failure_limit=-1 if elastic else 3,
            ),
        ),
    )
    try:
        _interruptible(trainer.fit, monitor, config.checkpoint.grace_s if task == "train" else 0)
    except ray.train.TrainingFailedError as error:
        said = ray.get(monitor.ended.remote())
        raise UserError(said or f"training cannot go on: {_reason(error)}") from error


def _thread_settings(shares: Shares) -> dict[str, str]:
    """Environment of a worker that computes on the CPU.

    OpenMP threads wait for each other by spinning, millions of turns long: as soon as anything else
    wants a core, a step takes several times as long. A short spin, then sleep, costs next to
    nothing on an idle machine. What the user has set stays.
    """
    settings = {"GOMP_SPINCOUNT": "10000"}
    return {} if shares.gpu else {k: os.environ.get(k, v) for k, v in settings.items()}


def _interruptible(fit: Callable[[], Any], monitor: Any, grace_s: float) -> None:
    """Run `fit` beside the main thread: in it, Ray Train takes Ctrl-C for itself and leaves 0.

    On Ctrl-C or SIGTERM the workers have `grace_s` to save and leave; a second one leaves at once.
    """
    failed: list[BaseException] = []
    done = threading.Event()

    def target() -> None:
        try:
            fit()
        except BaseException as error:  # noqa: BLE001 - raised below, in the main thread
            failed.append(error)
        done.set()

    threading.Thread(target=target, daemon=True, name="fit").start()
    try:
        # Not Thread.join: interrupted, Python takes the thread for ended (bpo-45274).
        while not done.wait(0.2):
            pass
    except (KeyboardInterrupt, SystemExit):
        if grace_s:
            print(f"\nsaving, for up to {grace_s:g} s; once more: leave now", flush=True)
            monitor.tell.remote(LEAVE)
            done.wait(grace_s)
        raise
    if failed:
        raise failed[0]


def _reason(error: BaseException) -> str:
    """What ended a worker, in a line."""
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    text = str(first)
    if isinstance(first, ray.exceptions.OutOfMemoryError) or "running low on memory" in text:
        return "its node ran low on memory and Ray ended the worker"
    if _died(first):
        return "the worker's process died (killed, or its node was lost)"
    if "Connection closed by peer" in text or "Connection reset by peer" in text:
        return "lost its connection to another worker, which died or whose node was lost"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else type(first).__name__)[:300]


def _died(error: BaseException) -> bool:
    """Whether a worker's process ended; other workers' errors only follow from that."""
    kinds = (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError)
    return isinstance(error, kinds) or "worker process has died" in str(error)


class Failures(ray.train.UserCallback):
    """Tells the monitor why a worker group ended; runs in Ray Train's controller."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train."""
        # Its pages of traceback about workers that are gone: the reason is told in one line.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        for rank, error in sorted(worker_exceptions.items()):
            reason = f"worker {rank}: {_reason(error)}"
            ray.get(self._monitor.failed.remote(reason, first=_died(error)))


@dataclass(frozen=True)
class Shares:
    """Who gets which part of the cluster: training workers, and Ray Data tasks."""

    gpu: bool
    per_worker: dict[str, float]
    threads: int
    data_cpus: float

    @classmethod
    def of(cls, config: Config) -> Shares:
        """Divide the cluster's CPUs as the config says, or so that both sides can work."""
        total = ray.cluster_resources()
        cpus, gpus = total.get("CPU", 1.0), total.get("GPU", 0.0)
        workers, device = config.parallel.max_workers, config.parallel.device
        gpu = device == "cuda" or (device == "auto" and gpus >= 1)
        if gpu and gpus < config.parallel.min_workers:
            raise UserError(
                f"parallel.workers: {config.parallel.min_workers} workers need a GPU each and the "
                f"cluster has {gpus:g}; use at most that many, or parallel.device=cpu"
            )
        # On CPU machines training is the larger part of the work: data tasks get a quarter.
        free = cpus - workers if gpu else cpus / 4
        data_cpus = float(config.data.cpus or max(1.0, free))
        each = config.parallel.cpus_per_worker
        if each is None:
            whole = gpu or config.parallel.elastic  # Ray counts elastic workers in whole CPUs
            each = 1.0 if whole else max(0.01, min(1.0, (cpus - data_cpus) / workers))
        per_worker = {"CPU": each, **({"GPU": 1.0} if gpu else {})}
        threads = config.parallel.threads or max(1, int((cpus - data_cpus) / workers))
        return cls(gpu, per_worker, threads, data_cpus)


class Watch:
    """The driver's eyes while workers train: shows what they report, and sees nodes that are about
    to be taken away, whose workers then save."""

    def __init__(self, monitor: Any, progress: Progress) -> None:
        self._monitor, self._progress = monitor, progress
        self._stop = threading.Event()
        self._draining: set[str] = set()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def close(self) -> None:
        """Show what is left, and stop."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            last = self._stop.wait(0.5)
            try:
                for line in ray.get(self._monitor.take.remote()):
                    self._progress(line)
                draining = _draining()
                if draining - self._draining:
                    self._monitor.tell.remote(SAVE)
                self._draining = draining
            except ray.exceptions.RayError as error:  # the session ends: a signal, a lost head
                log.warning("no more progress can be shown: %s", type(error).__name__)
                return
            if last:
                return


def _draining() -> set[str]:
    """Ids of nodes that Ray has been told will go away."""
    return set(ray._private.state.state.get_draining_nodes())


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs, at every (re)start."""
    monitor = settings["monitor"]
    if ray.get(monitor.ended.remote()):
        return  # started again after a mistake that no restart mends
    try:
        _train_or_evaluate(settings, monitor)
    except (UserError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError):
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            where = error.filename or settings["folder"]
            said = f"{where}: cannot be written: {error.strerror}; make room, then start again"
        ray.get(monitor.mistake.remote(said))
        # Raising ends the other workers too. The driver prints the message: no traceback here.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise


def _train_or_evaluate(settings: dict[str, Any], monitor: Any) -> None:
    # First of all, so that whatever ends this group from here on counts as its failure.
    context = ray.train.get_context()
    is_main, size = context.get_world_rank() == 0, context.get_world_size()
    begun = ray.get(monitor.begin.remote(size)) if is_main else {}
    import torch  # here, not above: the driver has no use for it

    from raysft import worker
    from raysft.parallel import World
    from raysft.train.loop import train

    worker.quiet()
    config = Config.model_validate(settings["config"])
    world = World.current(worker.device_of(config))
    if world.device.type == "cpu":
        torch.set_num_threads(settings["threads"])
    begun = world.gather(begun)[0]
    if "end" in begun:
        return  # failed too often; the driver says so
    time.sleep(begun.get("pause_s", 0.0))
    # Workers may hold every CPU of a small cluster: data tasks then ask for none, and share.
    left = ray.cluster_resources().get("CPU", 0.0) - world.size * settings["worker_cpus"]
    data_cpus = max(0.0, min(settings["data_cpus"], left)) / world.size
    data = worker.Data(
        examples=settings["examples"],
        eval=Index.load(settings["eval"][0][0]) if settings["eval"] else None,
        encoder=ray.get(settings["encoder"]),
        read_train=_reader(
            settings, "train", config.data.tokens_per_batch, config.run.seed, data_cpus
        ),
        read_eval=_reader(settings, "eval", config.evaluate.tokens_per_batch, None, data_cpus),
    )
    names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
    nodes = sorted(set(world.gather(names[ray.get_runtime_context().get_node_id()])))

    def progress(line: dict[str, Any]) -> None:
        monitor.report.remote(line)

    if world.is_main:
        progress({"workers": world.size, "nodes": nodes})
    folder = Path(settings["folder"])
    job = worker.build_job(config, folder, world, data, settings["total_steps"], progress)
    if settings["task"] == "evaluate":
        worker.evaluate_checkpoint(job)
        return
    job.start = {"nodes": nodes, **begun}
    job.hung = lambda reason: ray.get(
        monitor.failed.remote(f"worker {world.rank}: {reason}", first=True)
    )
    job.signal = Signal(monitor) if world.is_main else job.signal
    train(job)


class Signal:
    """The monitor's signal as of a moment ago, without waiting for it."""

    def __init__(self, monitor: Any) -> None:
        self._monitor, self._asked, self._value = monitor, monitor.signal.remote(), 0

    def __call__(self) -> int:
        ready, _ = ray.wait([self._asked], timeout=0)
        if ready:
            self._value = ray.get(self._asked)
            self._asked = self._monitor.signal.remote()
        return self._value


def _reader(
    settings: dict[str, Any], split: str, budget: int, seed: int | None, cpus: float
) -> Any:
    places = settings[split]
    if places is None:
        return None
    spec = ReaderSpec(places, settings["encoder"], budget, seed)
    return RayReader(spec, open_index(places).seconds, cpus).read


def _record_rejected(folder: Path, rejected: list[Quarantined]) -> None:
    """Name examples found unusable before training, once."""
    path = folder / "quarantine.jsonl"
    known = {line["id"] for line in read_lines(path)}
    lines = Lines(path)
    for found in rejected:
        if found.id not in known:
            lines.write(quarantine_line(found, 0))
    lines.close()


def _figure(name: str, value: float) -> str:
    return f"{value:.2%}" if name.startswith(("wer/", "cer/")) else f"{value:.4f}"
