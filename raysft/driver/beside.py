"""Evaluation beside training (`evaluate.beside`): while a group of workers trains, another one
evaluates the checkpoints that are due.

What is left to evaluate is read from the run's files: committed checkpoints of due steps that
evaluations.json does not know. So a start makes up for what the one before left. The oldest comes
first. Figures go to the monitor of training, whose rank 0 alone writes the run's files; what fails
here is warned of once, and is made at the end of training by the workers that trained.
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
from raysft.run.catalogue import Catalogue
from raysft.run.evaluations import Evaluations, Made, Measure
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
            while not self._stop.wait(LOOK_S) and ray.get(training.wanted.remote()):
                saves = ray.get(training.saves.remote())
                if saves == looked:
                    continue
                looked = saves
                while (steps := self._left(training)) and self._wanted(training):
                    self._evaluate(steps, training)
        except (ray.exceptions.RayError, OSError, UserError) as error:
            if not self._stop.is_set():
                log.warning(
                    "evaluate.beside: no more is evaluated beside training, but at its end: %s",
                    str(error) or type(error).__name__,
                )
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                training.over.remote()

    def _wanted(self, training: ActorHandle) -> bool:
        try:
            return not self._stop.is_set() and ray.get(training.wanted.remote())
        except ray.exceptions.RayError:
            return False

    def _left(self, training: ActorHandle) -> list[int]:
        """Steps to evaluate, the oldest first."""
        given = ray.get(training.tried.remote())
        committed = Catalogue.of(self.config.checkpoint, self.folder).committed()
        every, total = self.config.evaluate.every, self.settings["total_steps"]
        steps, done = [saved.step for saved in committed], Evaluations.load(self.folder)
        left = done.pending(steps, every, total, self.measure)
        return [step for step in left if step not in given]

    def _evaluate(self, steps: list[int], training: ActorHandle) -> None:
        """Have these evaluated by a group of workers; of the first that is not, say why."""
        named = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} and {len(steps) - 1} later ones"
        ray.get(training.report.remote({"doing": f"evaluating step {named} beside training"}))
        settings = {key: self.settings[key] for key in _HANDED_ON}
        settings["evaluated"] = {"steps": steps, "training": training}
        held = self.shares.per_worker["CPU"] * self.config.parallel.max_workers
        reason = "it ended without figures"
        try:
            workers.run(
                evaluating(self.config),
                self.folder,
                {**settings, "other_cpus": held},
                steps[-1],
                lambda line: None,
                self.permit,
                leave=lambda: not self._wanted(training),
                shares=self.shares.beside(),
            )
        except UserError as error:
            reason = str(error)
        if not self._wanted(training):
            return
        tried = ray.get(training.tried.remote())
        failed = next((step for step in steps if step not in tried), None)
        if failed is not None:
            warning = (
                f"evaluate.beside: the evaluation of step {failed} failed: {reason}; it is made at "
                "the end of training, or by the next start"
            )
            ray.get(training.made.remote(Made(failed, None, [warning])))
