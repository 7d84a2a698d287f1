"""A population's trials as Ray Tune sees them: each runs from one comparison to the next.

Tune's own PBT takes no searcher, and what makes a sweep survive its death is ours; and a trial
that Tune pauses counts as one that runs. So a trial that has come to a comparison ends, for Tune,
and its next part is another one: Tune runs as many at a time as there is room for, and knows of
nothing else. What happens between two parts, when all have come, is `sweep.population`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ray.tune.search import Searcher

from raysft.config import Config
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.run.lines import last_step
from raysft.sweep.folder import SweepFolder, Trial
from raysft.sweep.population import Population, decide, interval
from raysft.sweep.space import Dimension, points


class Generations(Searcher):
    """All trials to the next comparison, those that are behind first; then on from there."""

    def __init__(
        self,
        config: Config,
        sweep: SweepFolder,
        dimensions: Sequence[Dimension],
        mode: str,
        steps: int,
        progress: Callable[[JsonObject], None],
    ) -> None:
        """steps: of a trial. Does what an earlier start has decided and not done. Raises UserError
        where trials end before the first comparison."""
        super().__init__(metric="figure", mode="min")
        self._config, self._sweep, self._dimensions = config, sweep, dimensions
        self._mode, self._steps, self._progress = mode, steps, progress
        every = interval(config)
        if every >= steps:
            raise UserError(
                f"sweep.interval: {every}, but a trial has {steps} steps: trials would never be "
                "compared; set fewer (a multiple of evaluate.every), or train longer"
            )
        known = {trial.number for trial in sweep.trials()}
        seed = config.run.seed
        for number, point in enumerate(points(config.sweep, dimensions, seed)):
            if number not in known:
                sweep.add(Trial(number, point, number, seed))
        self._population = Population(sweep)
        self._population.settle(self._say)
        self._trials = {trial.number: trial for trial in sweep.trials()}
        self._running: dict[str, int] = {}
        self._begin(list(self._trials))

    def _say(self, text: str) -> None:
        self._progress({"doing": text})

    def _begin(self, numbers: list[int]) -> None:
        """The next part of these trials: to the comparison after the last one, or to the end."""
        step = self._population.step + interval(self._config)
        self._until = step if step < self._steps else 0
        self._points = self._population.points(list(self._trials.values()))

        def done(number: int) -> tuple[int, int]:
            run = self._sweep.run(self._trials[number])
            return last_step(run / "metrics.jsonl"), number

        self._queue = sorted(numbers, key=done)
        self._arrived: dict[int, float] = {}

    def suggest(self, trial_id: str) -> JsonObject | str | None:
        """See Searcher."""
        if self._sweep.stopping.exists():
            return Searcher.FINISHED
        if not self._queue:  # the others are waited for, or this was the end
            return None if self._running else Searcher.FINISHED
        number = self._queue.pop(0)
        self._running[trial_id] = number
        return {"number": number, "until": self._until, **self._points[number]}

    def on_trial_complete(
        self, trial_id: str, result: JsonObject | None = None, error: bool = False
    ) -> None:
        """See Searcher. A trial that failed is left out from here on."""
        number = self._running.pop(trial_id)
        if result and not error and result["step"] >= self._until:
            self._arrived[number] = result["figure"]
        if not (self._queue or self._running or self._sweep.stopping.exists()) and self._until:
            self._compare()

    def _compare(self) -> None:
        if not self._arrived:
            return
        step = self._until
        found = decide(
            self._dimensions,
            self._arrived,
            self._points,
            step=step,
            mode=self._mode,
            quantile=self._config.sweep.quantile,
            seed=self._config.run.seed,
        )
        self._population.write(step, self._arrived, found)
        self._population.settle(self._say)
        self._begin(list(self._arrived))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what there is to know is in the sweep's folder."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""
