"""A group of workers under its monitor: started, started again, and watched by the driver until it
has done what it is for, or it is known that it cannot."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysft.config import Config
from raysft.driver import entry, growing
from raysft.driver.group import Settings, died, interruptible, make_trainer, reason_of
from raysft.driver.monitor import Monitor
from raysft.driver.shares import Shares, train_environment
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.run.ownership import ANYONE, Permit
from raysft.run.signals import SAVE
from raysft.run.threads import tight

if TYPE_CHECKING:
    from ray.actor import ActorHandle

log = logging.getLogger(__name__)

Progress = Callable[[JsonObject], None]

# That workers which evaluate take to end, once they were told to. Those that wait for room yet end
# when they get it: see `entry.work`.
ENDS_S = 15.0


def run(
    config: Config,
    folder: Path,
    settings: Settings,
    step: int,
    progress: Progress,
    permit: Permit = ANYONE,
    leave: Callable[[], bool] = lambda: False,
    meanwhile: Callable[[ActorHandle], AbstractContextManager[object]] = nullcontext,
    shares: Shares | None = None,
) -> None:
    """Start workers, and start them again, until they have done what `settings` say.

    permit: asked meanwhile. step: of the checkpoint they begin with, -1 for none. leave: once it
    says so, the workers save and leave, and this returns. meanwhile: what goes on as long as they
    do, of their monitor. shares: theirs; None: of a cluster that is theirs. Raises UserError where
    it cannot be done.
    """
    # On this node: while the driver lives, so does the monitor, whatever other nodes are lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = (
        ray.remote(Monitor)
        .options(num_cpus=0, scheduling_strategy=here)
        .remote(
            *(config.parallel.max_failures, config.parallel.backoff_s, step),
            entry.trains(settings),
        )
    )
    watch = Watch(monitor, progress)
    progress({"doing": f"starting workers ({config.parallel.strategy})"})
    try:
        with meanwhile(monitor):
            _fit(config, folder, settings, monitor, permit, leave, shares)
        _raise_mistake(monitor)
    finally:
        watch.close()


def _raise_mistake(monitor: ActorHandle) -> None:
    """Raises the UserError that no restart mends, if there was one; with its traceback as cause."""
    message, details = ray.get([monitor.ended.remote(), monitor.details.remote()])
    if message and details:  # for --debug
        raise UserError(message) from RuntimeError(f"in a worker:\n{details}")
    if message:
        raise UserError(message)


def _fit(
    config: Config,
    folder: Path,
    settings: Settings,
    monitor: ActorHandle,
    permit: Permit,
    leave: Callable[[], bool],
    shares: Shares | None,
) -> None:
    alone = shares is None
    shares = shares or Shares.of(config)
    if alone and not shares.gpu and (line := tight(shares.threads, shares.room)) is not None:
        log.warning("%s", line)
    settings = {
        "other_cpus": shares.apart * config.evaluate.apart,
        **settings,
        "folder": str(folder),
        "data_cpus": shares.data_cpus,
        "worker_cpus": shares.per_worker["CPU"],
        "readers": shares.readers,
        "monitor": monitor,
    }
    for key, value in train_environment(config).items():
        os.environ.setdefault(key, value)
    elastic = config.parallel.elastic
    fewest, most = config.parallel.min_workers, config.parallel.max_workers
    trainer = make_trainer(
        "start",
        entry.work,
        settings,
        config,
        shares,
        folder,
        workers=(fewest, most) if elastic else most,
        log_level="WARNING",
        callbacks=[Failures(monitor)],
        # A node that is lost may take long to come again where another is started for it.
        failures=Restarts(monitor, elastic or growing.Autoscaler.now().grows),
    )
    try:
        grace_s = config.checkpoint.grace_s if entry.trains(settings) else 0.0
        leaves_s = math.inf if entry.trains(settings) else ENDS_S
        told = monitor.leave.remote
        interruptible(trainer.fit, lambda: ray.get(told()), grace_s, permit, leave, leaves_s)
    except ray.train.TrainingFailedError as error:
        _raise_mistake(monitor)
        work = "training" if entry.trains(settings) else "the evaluation"
        raise UserError(f"{work} cannot go on: {reason_of(error)}") from error


class Restarts(ray.train.FailureConfig):
    """Any number of restarts: `Monitor` counts them, for it knows whether the run gets on between
    them. None after a mistake: Ray Train asks at every failure, in its controller."""

    def __init__(self, monitor: ActorHandle, elastic: bool) -> None:
        self._monitor = monitor
        super().__init__(
            max_failures=-1,
            max_preemption_failures=-1,
            controller_failure_limit=-1 if elastic else 3,
        )

    def _limit(self) -> int:
        return 0 if ray.get(self._monitor.ended.remote()) else -1

    # Ray's own, a number for all of the run, is not kept.
    max_failures = property(_limit, lambda self, limit: None)
    max_preemption_failures = property(_limit, lambda self, limit: None)


class Failures(ray.train.UserCallback):
    """Tells the monitor why a worker group ended; runs in Ray Train's controller."""

    def __init__(self, monitor: ActorHandle) -> None:
        self._monitor = monitor

    def __setstate__(self, state: JsonObject) -> None:
        self.__dict__.update(state)  # the controller's process unpacks it
        # On a busy machine it warns of an answer that is late, with a traceback, and asks again.
        scaling = "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client"
        # A filter: Ray sets the levels of its loggers anew after this.
        logging.getLogger(scaling).addFilter(lambda record: record.levelno >= logging.ERROR)

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train."""
        # Its pages of traceback about workers that are gone: the reason is told in one line.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        for rank, error in sorted(worker_exceptions.items()):
            said = f"worker {rank}: {reason_of(error)}"
            ray.get(self._monitor.failed.remote(said, first=died(error)))


class Watch:
    """The driver's eyes while workers train: shows what they report, and sees nodes that are about
    to be taken away, whose workers then save."""

    def __init__(self, monitor: ActorHandle, progress: Progress) -> None:
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
