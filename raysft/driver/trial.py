"""A trial of a sweep: what Ray Tune sees of it, and the driver of its run.

    Tuned    Tune's side: a step is one evaluation of the run. What an earlier start has evaluated
             it tells again, so that searcher and scheduler know it, and trains on from there.
    Driver   a process of its own that trains the run, as jobs/sft.py does. Ray would put all that
             starts from within a trial into the trial's own share of the cluster, where there is
             no room for workers: this one is outside of it.

A trial's state is its run's folder, and a file beside it; Tune keeps nothing of it.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysft.config.load import validate
from raysft.driver import launch, preflight, warm
from raysft.errors import UserError
from raysft.failures import told
from raysft.json_types import JsonObject
from raysft.loggers import check as loggers
from raysft.sweep.folder import State, SweepFolder
from raysft.sweep.population import Population
from raysft.sweep.space import point_config

log = logging.getLogger(__name__)

LOOK_S = 0.5
LEAVES_S = 60.0  # that a run may take to leave, beyond the time that it has to save
WORST = 1e30  # of a figure that is no number


class Driver:
    """Drives one run, in a thread; asked by `Tuned`. An actor."""

    def __init__(self) -> None:
        self._leave = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: tuple[str, str] | None = None

    def train(
        self, tree: JsonObject, where: str, credentials: dict[str, str], until: int = 0
    ) -> None:
        """Begin, or go on with, the run of the config in `tree`. where: for messages; credentials:
        of its loggers; until: see `launch.run`."""
        loggers.take(credentials)

        def work() -> None:
            try:
                config = validate(tree, where)
                preflight.check(config)
                warm.processes(config)
                launch.run(config, lambda line: None, self._leave, until)
            except UserError as error:
                self._error = (str(error), "")
            except BaseException as error:  # noqa: BLE001 - told to whoever asks
                self._error = (told(error), traceback.format_exc())

        self._thread = threading.Thread(target=work, name="run", daemon=True)
        self._thread.start()

    def ended(self) -> bool:
        """Whether the run is over."""
        return self._thread is None or not self._thread.is_alive()

    def error(self) -> tuple[str, str] | None:
        """What ended it, and the traceback of what is not the user's to mend."""
        return self._error

    def leave(self) -> None:
        """Let the run save and end."""
        self._leave.set()


class Tuned(tune.Trainable):
    """See the module. Its config: {"number": of the trial, **its point}; of a population also
    "until", the step at which this part of the trial ends (0: with the run)."""

    def setup(
        self,
        config: JsonObject,
        *,
        tree: JsonObject,
        folder: str,
        metric: str,
        mode: str,
        grace_s: float,
        credentials: dict[str, str],
    ) -> None:
        """tree: of the config that trials share: all but name, seed and point. folder: the sweep's.
        metric: the figure; mode: min or max. grace_s: in which a run saves. credentials: for
        loggers."""
        self._credentials = credentials
        self._sweep, self._tree = SweepFolder(Path(folder)), tree
        self._metric, self._grace_s = metric, grace_s
        self._worst = WORST if mode == "min" else -WORST
        self._trial = self._sweep.trial(config["number"])
        self._driver: ActorHandle | None = None
        self._until = config.get("until", 0)
        self._told, self._figure = -1, self._worst

    def step(self) -> JsonObject:
        """The next evaluation, or the end."""
        try:
            return self._next()
        except ray.exceptions.RayActorError:
            self._fail("the process of its driver died")

    def _next(self) -> JsonObject:
        while True:
            # Asked first: what is written before the end is then seen below.
            ended = self._driver is not None and ray.get(self._driver.ended.remote())
            for line in self._sweep.evaluations(self._trial):
                if line["step"] > self._told:
                    return self._result(line)
            if self._sweep.stopping.exists():
                self._leave()
                return self._end()
            if self._driver is None:
                if self._sweep.state(self._trial).status in ("finished", "stopped"):
                    return self._end()
                if self._until and self._sweep.reached(self._trial, self._until):
                    return self._end()
                self._start()
            elif ended:
                if (error := ray.get(self._driver.error.remote())) is not None:
                    self._fail(*error)
                if self._until and not self._sweep.reached(self._trial, self._until):
                    self._fail(f"it ended before step {self._until} was saved and evaluated")
                self._set(status="waiting" if self._until else "finished")
                self._kill()
                if self._until:
                    return self._end()
            else:
                time.sleep(LOOK_S)

    def _result(self, line: JsonObject) -> JsonObject:
        if self._metric not in line:
            given = ", ".join(name for name in line if "/" in name) or "none"
            self._fail(f"sweep.metric: {self._metric} is not in its evaluation; there are {given}")
        value = float(line[self._metric])
        self._told, self._figure = line["step"], value if math.isfinite(value) else self._worst
        return {"step": self._told, "figure": self._figure, "done": False}

    def _end(self) -> JsonObject:
        return {"step": max(self._told, 0), "figure": self._figure, "done": True}

    def _fail(self, message: str, details: str = "") -> NoReturn:
        self._set(status="failed", reason=message)
        if details:
            log.warning("trial %s:\n%s", self._trial.name, details)
        self._kill()
        raise RuntimeError(message)

    def _set(self, **changes: object) -> State:
        return self._sweep.set_state(self._trial, **changes)

    def _own_tree(self, where: str) -> JsonObject:
        run = {**self._tree["run"], "name": self._trial.name, "seed": self._trial.seed}
        point = Population(self._sweep).point(self._trial)
        return point_config({**self._tree, "run": run}, point, where).model_dump(mode="json")

    def _start(self) -> None:
        attempts = self._sweep.state(self._trial).attempts + 1
        self._set(status="running", attempts=attempts, reason="")
        where = f"trial {self._trial.name}"
        try:
            tree = self._own_tree(where)
        except UserError as error:
            self._fail(str(error))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._driver = (
            ray.remote(Driver)
            .options(num_cpus=0, max_concurrency=4, scheduling_strategy=here)
            .remote()
        )
        started = self._driver.train.remote(tree, where, self._credentials, self._until)
        ray.get(started)

    def _leave(self) -> None:
        """Have the run save and end, if it is under way."""
        if self._driver is None:
            return
        self._driver.leave.remote()
        until = time.monotonic() + self._grace_s + LEAVES_S
        while time.monotonic() < until and not ray.get(self._driver.ended.remote()):
            time.sleep(LOOK_S)
        self._kill()

    def _kill(self) -> None:
        if self._driver is not None:
            ray.kill(self._driver)
        self._driver = None

    def cleanup(self) -> None:
        """Tune has no more use for it: it was ended early."""
        # Tune then ends this process by a signal, of which Ray's handler makes a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        if self._driver is None:
            return
        self._leave()
        lines = self._sweep.evaluations(self._trial)
        if lines and lines[-1].get("final"):  # it had come to its end meanwhile
            self._set(status="finished")
        else:
            self._set(status="stopped", reason=f"behind others at step {self._told}")
