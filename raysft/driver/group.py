"""A group of Ray Train workers, as whatever needs one starts it: what each gets of the cluster, how
the group is made, what its workers do first, how its end is waited for, and what ended it.

Imported by Ray's controller, which has no use for models: they are imported in workers only.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import ray.train.torch

from raysft import failures, patience, plugins, remarks
from raysft.config import Config
from raysft.driver.shares import Shares, worker_environment
from raysft.run.ownership import ANYONE, Permit

if TYPE_CHECKING:
    from raysft.parallel import World

# What the driver hands to workers, by name: whatever can be pickled, handles of actors included.
Settings = dict[str, Any]
GPU_BACKENDS = "cpu:gloo,cuda:nccl"  # offloaded parameters and counts travel as CPU tensors
RESIZE_EVERY_S = 10.0  # how often an elastic group looks for nodes that came


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


def interruptible(
    fit: Callable[[], object],
    leave: Callable[[], bool] = lambda: False,
    grace_s: float = 0.0,
    permit: Permit = ANYONE,
    asked: Callable[[], bool] = lambda: False,
    leaves_s: float = math.inf,
) -> None:
    """Run `fit` beside the main thread: in it, Ray Train takes Ctrl-C for itself and leaves 0.

    On Ctrl-C or SIGTERM calls `leave`, which says whether workers have begun: they then have
    `grace_s` to save and leave; a second one leaves at once. permit: asked all the while; its
    UserError ends the wait. asked: whether someone wants the workers to save and leave; for their
    end it then waits, at most for `leaves_s`.
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
    told, until = False, math.inf
    try:
        # Not Thread.join: interrupted, Python takes the thread for ended (bpo-45274).
        while not done.wait(0.2) and time.monotonic() < until:
            if not told and asked():
                told, until = True, time.monotonic() + leaves_s
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
