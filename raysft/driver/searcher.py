"""Ray Tune asks here for the next trial, and tells here how one ended."""

from __future__ import annotations

from statistics import fmean

from ray.tune.search import Searcher

from raysft.json_types import JsonObject
from raysft.sweep.choose import Chooser
from raysft.sweep.folder import SweepFolder, Trial, seeded


class Trials(Searcher):
    """First the trials that earlier starts began, then those of the chooser's points."""

    def __init__(self, sweep: SweepFolder, chooser: Chooser, seeds: int, seed: int) -> None:
        """seeds: trials of a point. seed: run.seed of the first."""
        super().__init__(metric="figure", mode="min")
        self._sweep, self._chooser = sweep, chooser
        self._seeds, self._seed = seeds, seed
        self._queue = sweep.trials()
        self._points = 0
        for trial in self._queue:
            if trial.point_number == self._points:
                chooser.begun(trial.point)
                self._points += 1
        # One that ended between two trials of a point.
        self._queue += self._missing()
        self._known = {trial.number for trial in sweep.trials()}
        self._running: dict[str, Trial] = {}
        self._values: dict[int, list[float | None]] = {}

    def _missing(self) -> list[Trial]:
        if not self._queue:
            return []
        last = self._queue[-1]
        trials = seeded(last.point_number, last.point, self._seeds, self._seed)
        return [trial for trial in trials if trial.number > last.number]

    def suggest(self, trial_id: str) -> JsonObject | str | None:
        """See Searcher."""
        if self._sweep.stopping.exists():
            return Searcher.FINISHED
        if not self._queue:
            point = self._chooser.next()
            if point is None:
                return Searcher.FINISHED
            self._queue += seeded(self._points, point, self._seeds, self._seed)
            self._points += 1
        trial = self._queue.pop(0)
        if trial.number not in self._known:
            self._sweep.add(trial)
        self._running[trial_id] = trial
        return {"number": trial.number, **trial.point}

    def on_trial_complete(
        self, trial_id: str, result: JsonObject | None = None, error: bool = False
    ) -> None:
        """See Searcher."""
        trial = self._running.pop(trial_id)
        values = self._values.setdefault(trial.point_number, [])
        values.append(None if error or not result else result["figure"])
        if len(values) == self._seeds:
            good = [value for value in values if value is not None]
            self._chooser.tell(trial.point_number, fmean(good) if good else None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what there is to know is in the sweep's folder."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""
