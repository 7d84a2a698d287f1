"""A group of Ray Train workers, as whatever needs one starts it: what each gets of the cluster, how
the group is made, what its workers do first, how its end is waited for, and what ended it.

Imported by Ray's controller, which has no use for models: they are imported in workers only.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import ray.train.torch

from raysft import failures, patience, plugins, remarks
from raysft.config import Config
from raysft.driver.readers import CPUS_A_GPU, Readers
from raysft.errors import UserError
from raysft.run.ownership import ANYONE, Permit

if TYPE_CHECKING:
    from raysft.parallel import World

# What the driver hands to workers, by name: whatever can be pickled, handles of actors included.
Settings = dict[str, Any]
GPU_BACKENDS = "cpu:gloo,cuda:nccl"  # offloaded parameters and counts travel as CPU tensors
ALLOC, OLD_ALLOC = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # its name until torch 2.9
# cuBLAS sums in one order where it has buffers of its own for each stream.
CUBLAS_WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
GPU_THREADS = 8  # at most, for what a worker's host does: padding, copies, chores
RESIZE_EVERY_S = 10.0  # how often an elastic group looks for nodes that came


@dataclass(frozen=True)
class Shares:
    """Who gets which part of the cluster: training workers, and data tasks.

    threads: of a worker, for all that its CPU does. room: cores that a worker may use. readers:
    nodes that data tasks are kept to.
    """

    gpu: bool
    per_worker: dict[str, float]
    threads: int
    room: int
    data_cpus: float
    readers: Readers = field(default_factory=Readers)

    @classmethod
    def of(cls, config: Config) -> Shares:
        """Divide the cluster's CPUs as the config says, or so that both sides can work."""
        total = ray.cluster_resources()
        cpus, gpus = total.get("CPU", 1.0), total.get("GPU", 0.0)
        workers, device = config.parallel.max_workers, config.parallel.device
        gpu = device == "cuda" or (device == "auto" and gpus >= 1)
        if gpu and not gpus:
            raise UserError(
                "parallel.device: cuda, but no node of the cluster has a GPU; start it where there "
                "is one (`nvidia-smi` lists those of a machine), or set parallel.device=cpu"
            )
        if gpu and gpus < config.parallel.min_workers:
            raise UserError(
                f"parallel.workers: {config.parallel.min_workers} workers need a GPU each and the "
                f"cluster has {gpus:g}; use at most that many, or parallel.device=cpu"
            )
        # On CPU machines training is the larger part of the work: data tasks get a quarter.
        free = cpus - workers if gpu else cpus / 4
        readers = Readers.of(config, gpu)
        if (readers.labels or readers.apart) and not config.data.cpus:
            free = sum(readers.cpus().values())
            if not free:
                raise UserError(
                    f"data.nodes: no node of the cluster has the labels {readers.labels} and a "
                    "CPU; name those of one (`ray start --labels`), or set data.cpus to wait for "
                    "such nodes"
                )
            if readers.grows:
                free = max(free, CPUS_A_GPU * workers if gpu else cpus / 4)
        data_cpus = float(config.data.cpus or max(1.0, free))
        each = config.parallel.cpus_per_worker
        if each is None:
            whole = gpu or config.parallel.elastic  # Ray counts elastic workers in whole CPUs
            each = 1.0 if whole else max(0.01, min(1.0, (cpus - data_cpus) / workers))
        per_worker = {"CPU": each, **({"GPU": 1.0} if gpu else {})}
        room = max(1, int((cpus - data_cpus) / workers))
        own = room
        if gpu and readers.apart:  # workers have the cores beside their GPUs to themselves
            own = max(2, min(GPU_THREADS, int((cpus - sum(readers.cpus().values())) / gpus)))
        elif gpu:
            # Data tasks may have most cores; what the host does there comes in bursts.
            own = max(2, min(GPU_THREADS, int(cpus / gpus / 4)))
        return cls(gpu, per_worker, config.parallel.threads or own, room, data_cpus, readers)


def make_trainer(
    name: str,
    work: Callable[[Settings], None],
    settings: Settings,
    config: Config,
    shares: Shares,
    folder: Path,
    *,
    workers: int | tuple[int, int],
    log_level: str,
    callbacks: Sequence[ray.train.UserCallback] = (),
    failures: ray.train.FailureConfig | None = None,
) -> ray.train.torch.TorchTrainer:
    """A group whose workers run `work(settings)`, to be started by `fit`; see `join`.

    name: of what it does, for Ray's own folder, which lies in `folder`, the run's. workers: how
    many, or (min, max). log_level: of Ray Train. failures: when workers start again; None: never.
    """
    return ray.train.torch.TorchTrainer(
        work,
        train_loop_config={
            **settings,
            "config": config.model_dump(mode="json"),
            "threads": shares.threads,
            "gpu": shares.gpu,
        },
        torch_config=ray.train.torch.TorchConfig(
            backend=GPU_BACKENDS if shares.gpu else "gloo",
            timeout_s=int(config.parallel.timeout_s),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
            use_gpu=shares.gpu,
            resources_per_worker=shares.per_worker,
            # GPUs of few whole nodes speak over their own links; CPUs of many nodes are idler.
            placement_strategy="PACK" if shares.gpu else "SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=f"{name}_{time.strftime('%Y%m%d_%H%M%S')}_{uuid.uuid4().hex[:6]}",
            storage_path=str(folder / "ray_train"),
            worker_runtime_env={"env_vars": worker_environment(config, shares)},
            logging_config=ray.train.LoggingConfig(log_level=log_level),
            callbacks=list(callbacks),
            failure_config=failures,
        ),
    )


def join(settings: Settings, log_folder: Path | None) -> tuple[Config, World]:
    """What each worker of a group does first, with the settings that `make_trainer` gave it: the
    config, and the process group that Ray Train has made.

    log_folder: where libraries' warnings go; None: nowhere.
    """
    import torch  # here, not above: the driver has no use for it

    from raysft import worker
    from raysft.parallel import World

    remarks.quiet(log_folder)
    plugins.load(settings["config"]["plugins"])
    config = Config.model_validate(settings["config"])
    patience.allow(config.patience_s)
    world = World.current(worker.device_of(config, settings["gpu"]))
    torch.set_num_threads(settings["threads"])
    return config, world


def worker_environment(config: Config, shares: Shares) -> dict[str, str]:
    """Environment of a worker, where libraries read it before our code runs. What the user has set
    stays.

    A group on gloo (every run has some) would connect each worker with each, of a thousand a
    million times: connected is who speaks to whom. On a CPU: OpenMP threads wait for each other by
    spinning, millions of turns long: as soon as anything else wants a core, a step takes several
    times as long. A short spin, then sleep, costs next to nothing on an idle machine. On a GPU:
    torch's memory grows in place, where blocks of many sizes would lie beside each other half
    empty; and Ray would give what the host does one thread.
    """
    settings = {"TORCH_GLOO_LAZY_INIT": "1"}
    if not shares.gpu:
        settings["GOMP_SPINCOUNT"] = "10000"
    else:
        settings["OMP_NUM_THREADS"] = str(shares.threads)
        if OLD_ALLOC not in os.environ:
            settings[ALLOC] = "expandable_segments:True"
        if config.train.deterministic:
            settings |= CUBLAS_WORKSPACE
    return {k: os.environ.get(k, v) for k, v in settings.items()}


def interruptible(
    fit: Callable[[], object],
    leave: Callable[[], bool] = lambda: False,
    grace_s: float = 0.0,
    permit: Permit = ANYONE,
    asked: threading.Event | None = None,
) -> None:
    """Run `fit` beside the main thread: in it, Ray Train takes Ctrl-C for itself and leaves 0.

    On Ctrl-C or SIGTERM calls `leave`, which says whether workers have begun: they then have
    `grace_s` to save and leave; a second one leaves at once. permit: asked all the while; its
    UserError ends the wait. asked: set by whoever wants the workers to save and leave, for whose
    end it then waits.
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
    told = False
    try:
        # Not Thread.join: interrupted, Python takes the thread for ended (bpo-45274).
        while not done.wait(0.2):
            if asked is not None and asked.is_set() and not told:
                told = True
                leave()
            with contextlib.suppress(OSError):  # this process writes nothing; workers ask as well
                permit.require()
    except (KeyboardInterrupt, SystemExit):
        if grace_s and leave():
            print(f"\nsaving, for up to {grace_s:g} s; once more: leave now", flush=True)
            done.wait(grace_s)
        raise
    if failed:
        raise failed[0]


def reason_of(error: BaseException) -> str:
    """What ended a worker, in a line."""
    workers = getattr(error, "worker_failures", None) or {}
    first = next(iter(workers.values()), error)
    if isinstance(first, ray.exceptions.OutOfMemoryError) or failures.shows(first, "low memory"):
        return "its node ran low on memory and Ray ended the worker"
    if died(first):
        return "the worker's process died (killed, or its node was lost)"
    if failures.shows(first, "lost connection"):
        return "lost its connection to another worker, which died or whose node was lost"
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    return (lines[-1] if lines else type(first).__name__)[:300]


def died(error: BaseException) -> bool:
    """Whether a worker's process ended; other workers' errors only follow from that."""
    kinds = (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError)
    return isinstance(error, kinds) or failures.shows(error, "died")
