"""Config -> a running job: index and plan on the driver, Ray Train workers, one outcome.

prepare   encoder, index, plan (see `prepare`)
train     TorchTrainer with restarts; every worker runs `train.loop.train` on its lanes
outcome   where the run's folder is and what the last evaluation said
"""

from __future__ import annotations

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

from raysft.config import Config
from raysft.data.example import Quarantined
from raysft.data.index import Index
from raysft.data.plan import Cursor
from raysft.data.stream import RayReader, ReaderSpec
from raysft.errors import UserError
from raysft.prepare import Prepared, prepare
from raysft.rundir import open_run
from raysft.train.checkpoint import latest, read_meta
from raysft.train.metrics import Lines, quarantine_line, read_lines

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]


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
    """Train (or continue) the run, or with task="evaluate" evaluate its newest checkpoint."""
    folder = open_run(config)
    prepared = prepare(config, folder)
    if task == "evaluate":
        if latest(folder) is None:
            raise UserError(f"{folder}: no committed checkpoint to evaluate; train first")
        if prepared.eval is None:
            raise UserError("data.eval: empty; name a source, e.g. --data test.jsonl")
    _record_rejected(folder, prepared.rejected)
    saved = latest(folder)
    if saved is not None:
        prepared.plan.steps(Cursor.from_json(read_meta(saved)["cursor"]))  # refuses another plan's
        print(f"continuing {folder} from step {read_meta(saved)['step']}", flush=True)
    monitor = Monitor.options(num_cpus=0).remote()
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(monitor, progress, stop), daemon=True)
    watcher.start()
    try:
        _fit(prepared, folder, monitor, task)
        failure = ray.get(monitor.failure.remote())
    finally:
        stop.set()
        watcher.join(timeout=10)
    if failure:
        raise UserError(failure)
    lines = read_lines(folder / "eval.jsonl")
    evaluation = {k: v for k, v in lines[-1].items() if k != "step"} if lines else {}
    saved = latest(folder)
    return Outcome(folder, read_meta(saved)["step"] if saved else 0, evaluation)


def _fit(prepared: Prepared, folder: Path, monitor: Any, task: str) -> None:
    config = prepared.config
    shares = Shares.of(config)
    settings = {
        "config": config.model_dump(mode="json"),
        "folder": str(folder),
        "train": str(prepared.train.folder),
        "eval": str(prepared.eval.folder) if prepared.eval else None,
        "encoder": ray.put(prepared.encoder),
        "total_steps": prepared.total_steps,
        "examples": len(prepared.train) + len(prepared.train.rejected),
        "threads": shares.threads,
        "data_cpus": shares.data_cpus / config.parallel.workers,
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
            num_workers=config.parallel.workers,
            use_gpu=shares.gpu,
            resources_per_worker=shares.per_worker,
            placement_strategy="SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=f"start_{time.strftime('%Y%m%d_%H%M%S')}_{uuid.uuid4().hex[:6]}",
            storage_path=str(folder / "ray_train"),
            worker_runtime_env={"env_vars": _thread_settings(shares)},
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(
                max_failures=config.parallel.max_failures, controller_failure_limit=3
            ),
        ),
    )
    try:
        _interruptible(trainer.fit)
    except ray.train.TrainingFailedError as error:
        said = ray.get(monitor.failure.remote())
        raise UserError(said or _cause(error, config)) from error


def _thread_settings(shares: Shares) -> dict[str, str]:
    """Environment of a worker that computes on the CPU.

    OpenMP threads wait for each other by spinning, millions of turns long: as soon as anything else
    wants a core, a step takes several times as long. A short spin, then sleep, costs next to
    nothing on an idle machine. What the user has set stays.
    """
    settings = {"GOMP_SPINCOUNT": "10000"}
    return {} if shares.gpu else {k: os.environ.get(k, v) for k, v in settings.items()}


def _interruptible(fit: Callable[[], Any]) -> None:
    """Run `fit` beside the main thread: in it, Ray Train takes Ctrl-C for itself and leaves 0."""
    failed: list[BaseException] = []

    def target() -> None:
        try:
            fit()
        except BaseException as error:  # noqa: BLE001 - raised below, in the main thread
            failed.append(error)

    thread = threading.Thread(target=target, daemon=True, name="fit")
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failed:
        raise failed[0]


def _cause(error: ray.train.TrainingFailedError, config: Config) -> str:
    """One line for a group of workers that failed more often than it may."""
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    last = lines[-1] if lines else type(first).__name__
    return (
        f"training failed and parallel.max_failures={config.parallel.max_failures} restarts are "
        f"used up: {last}; the same command continues from the last checkpoint"
    )


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
        workers, device = config.parallel.workers, config.parallel.device
        gpu = device == "cuda" or (device == "auto" and gpus >= 1)
        if gpu and gpus < workers:
            raise UserError(
                f"parallel.workers: {workers} workers need a GPU each and the cluster has "
                f"{gpus:g}; use at most that many, or parallel.device=cpu"
            )
        # On CPU machines training is the larger part of the work: data tasks get a quarter.
        free = cpus - workers if gpu else cpus / 4
        data_cpus = float(config.data.cpus or max(1.0, free))
        each = config.parallel.cpus_per_worker
        if each is None:
            each = 1.0 if gpu else max(0.01, min(1.0, (cpus - data_cpus) / workers))
        per_worker = {"CPU": each, **({"GPU": 1.0} if gpu else {})}
        threads = config.parallel.threads or max(1, int((cpus - data_cpus) / workers))
        return cls(gpu, per_worker, threads, data_cpus)


@ray.remote
class Monitor:
    """Where workers tell the driver how it goes: progress, and a mistake that no restart mends."""

    def __init__(self) -> None:
        self._lines: list[dict[str, Any]] = []
        self._failure: str | None = None

    def report(self, line: dict[str, Any]) -> None:
        """Called by rank 0."""
        self._lines.append(line)

    def take(self) -> list[dict[str, Any]]:
        """What was reported since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def fail(self, message: str) -> None:
        """Remember the first mistake."""
        self._failure = self._failure or message

    def failure(self) -> str | None:
        """The mistake, if there was one: workers that are started again stop at once."""
        return self._failure


def _watch(monitor: Any, progress: Progress, stop: threading.Event) -> None:
    while True:
        last = stop.wait(0.5)
        try:
            lines = ray.get(monitor.take.remote())
        except ray.exceptions.RayError as error:  # the session ends: Ctrl-C, SIGTERM, a lost head
            log.warning("no more progress can be shown: %s", type(error).__name__)
            return
        for line in lines:
            progress(line)
        if last:
            return


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs, at every (re)start."""
    monitor = settings["monitor"]
    if ray.get(monitor.failure.remote()):
        return  # started again after a mistake that no restart mends
    try:
        _train_or_evaluate(settings, lambda line: monitor.report.remote(line))
    except (UserError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError):
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            where = error.filename or settings["folder"]
            said = f"{where}: cannot be written: {error.strerror}; make room, then start again"
        ray.get(monitor.fail.remote(said))
        # Raising ends the other workers too. The driver prints the message: no traceback here.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise


def _train_or_evaluate(settings: dict[str, Any], progress: Progress) -> None:
    import torch  # here, not above: the driver has no use for it

    from raysft import worker
    from raysft.parallel import World
    from raysft.train.loop import train

    worker.quiet()
    config = Config.model_validate(settings["config"])
    world = World.current(worker.device_of(config))
    if world.device.type == "cpu":
        torch.set_num_threads(settings["threads"])
    data = worker.Data(
        train=Index.load(settings["train"]),
        eval=Index.load(settings["eval"]) if settings["eval"] else None,
        encoder=ray.get(settings["encoder"]),
        read_train=_reader(settings, "train", config.data.tokens_per_batch, config.run.seed),
        read_eval=_reader(settings, "eval", config.evaluate.tokens_per_batch, None),
    )
    names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
    nodes = sorted(set(world.gather(names[ray.get_runtime_context().get_node_id()])))
    if world.is_main:
        progress({"workers": world.size, "nodes": nodes})
    folder = Path(settings["folder"])
    job = worker.build_job(config, folder, world, data, settings["total_steps"], progress)
    if settings["task"] == "evaluate":
        worker.evaluate_checkpoint(job)
    else:
        train(job)


def _reader(settings: dict[str, Any], split: str, budget: int, seed: int | None) -> Any:
    folder = settings[split]
    if folder is None:
        return None
    spec = ReaderSpec(folder, settings["encoder"], budget, seed)
    return RayReader(spec, Index.load(folder).seconds, settings["data_cpus"]).read


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
