"""Evaluation beside training (`evaluate.beside`): while a group of workers trains, another one
evaluates the checkpoints that are due.

What is left to evaluate is read from the run's files: committed checkpoints of due steps that
evaluations.json does not know. So a start makes up for what the one before left. The oldest comes
first; the group waits for the next with its model. Figures go to the monitor of training, whose
rank 0 alone writes the run's files; what fails here is warned of once, and is made at the end of
training by the workers that trained.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from raysft.config import Config
from raysft.driver import workers
from raysft.driver.group import Settings
from raysft.driver.shares import Shares
from raysft.errors import UserError
from raysft.run.evaluations import Made, Measure, left
from raysft.run.ownership import ANYONE, Permit

if TYPE_CHECKING:
    from ray.actor import ActorHandle

log = logging.getLogger(__name__)

LOOK_S = 0.5
_HANDED_ON = ("eval", "encoder", "lease", "driver")  # of what workers that train are told


def alone(config: Config) -> Config:
    """`config` without evaluation beside training."""
    settings = config.evaluate.model_copy(update={"beside": False, "workers": 1})
    return config.model_copy(update={"evaluate": settings})


def evaluating(config: Config) -> Config:
    """The config of the group that evaluates: what it says of how many workers share a model is of
    those that train."""
    few = {"workers": config.evaluate.workers, "replicate": "auto", "ep_size": None}
    parallel = config.parallel.model_copy(update=few)
    return alone(config).model_copy(update={"parallel": parallel})


@dataclass
class Beside:
    """The evaluations of one submission. settings, shares: of the group that trains. measure: of
    an evaluation while training."""

    config: Config
    folder: Path
    settings: Settings
    measure: Measure
    shares: Shares
    permit: Permit = ANYONE
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def meanwhile(self, training: ActorHandle) -> Iterator[None]:
        """Around the time in which workers train. training: their monitor."""
        thread = threading.Thread(target=self._run, args=(training,), daemon=True, name="beside")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(timeout=workers.ENDS_S)

    def _run(self, training: ActorHandle) -> None:
        looked = -1
        try:
            while not self._stop.wait(LOOK_S) and self._wanted(training):
                saves = ray.get(training.saves.remote())
                if saves == looked or not self._left(training):
                    looked = saves
                elif not self._evaluate(training):
                    return
        except (ray.exceptions.RayError, OSError, UserError) as error:
            if not self._stop.is_set():
                log.warning("%s", self._given_up(str(error) or type(error).__name__))
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                training.over.remote()

    def _wanted(self, training: ActorHandle) -> bool:
        try:
            return not self._stop.is_set() and ray.get(training.wanted.remote())
        except ray.exceptions.RayError:
            return False

    def _left(self, training: ActorHandle) -> list[int]:
        given = ray.get(training.tried.remote())
        return left(self.folder, self.config, self._total, self.measure, given)

    @property
    def _total(self) -> int:
        return self.settings["total_steps"]

    def _given_up(self, reason: str) -> str:
        return (
            "evaluate.beside: nothing more is evaluated beside training, but when it is at its "
            f"end, or by the next start: {reason}"
        )

    def _evaluate(self, training: ActorHandle) -> bool:
        """Have a group of workers evaluate what is due, until that is no longer wanted or fails;
        returns whether another one might do better."""
        settings = {key: self.settings[key] for key in _HANDED_ON}
        about = {"training": training, "total_steps": self._total}
        held = self.shares.per_worker["CPU"] * self.config.parallel.max_workers
        reason = "its workers ended"
        try:
            workers.run(
                evaluating(self.config),
                self.folder,
                {**settings, "evaluated": about, "other_cpus": held},
                -1,
                lambda line: None,
                self.permit,
                leave=lambda: not self._wanted(training),
                shares=self.shares.beside(),
            )
        except UserError as error:
            reason = str(error)
        if not self._wanted(training):
            return False
        step = ray.get(training.tried_last.remote())
        said = self._given_up(reason)
        if step is not None:  # they came so far
            said = (
                f"evaluate.beside: the evaluation of step {step} failed: {reason}; it is made when "
                "training is at its end, or by the next start"
            )
        ray.get(training.made.remote(Made(step or 0, None, [said])))
        return step is not None
