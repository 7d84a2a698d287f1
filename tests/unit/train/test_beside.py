"""evaluate.beside: training goes on while others evaluate its checkpoints, and every figure is that
of an evaluation for which it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysft import worker
from raysft.config import Config
from raysft.driver.monitor import Monitor
from raysft.driver.preflight import read_eval
from raysft.parallel import World
from raysft.run.catalogue import Catalogue
from raysft.run.evaluations import Evaluation, Evaluations, Made, Measure, predictions_of
from raysft.run.folder import run_folder
from raysft.run.lines import read_lines
from raysft.run.signals import LEAVE
from raysft.train.job import Job
from raysft.train.loop import train
from tests.support import worlds

STEPS, EVERY = 12, 3
DUE = [3, 6, 9]


def config(folder: Path, name: str, **changes: Any) -> Config:
    settings = {
        "data__eval": [{"path": str(worlds.units(folder)), "name": "dev"}],
        "train__max_steps": STEPS,
        "evaluate__every": EVERY,
        "evaluate__max_examples": 20,
        "checkpoint__every": 5,
        "checkpoint__keep": 1,
    }
    return worlds.tiny(folder, name, **(settings | changes))


class Group:
    """A second group of workers, in this process: it has a model of its own, and evaluates what is
    due when it is asked. A step in `late` it gives out only at `end`."""

    def __init__(self, job: Job, late: tuple[int, ...] = ()) -> None:
        self._config, self._folder, self._total = job.config, job.folder, job.total_steps
        self._late, self._alone = late, False
        self._monitor = Monitor(0, 0.0)
        encoder, index = read_eval(job.config, job.folder, job.folder)
        data = worker.Data(0, index, encoder, None, worker.Reader(index, encoder, 8192, None).read)
        self._evaluator = worker.build_evaluator(job.config, job.folder, World.current(), data)
        self.given: list[int] = []

    def _evaluate(self) -> None:
        measure = self._evaluator.evaluate.measure(False)
        committed = Catalogue.of(self._config.checkpoint, self._folder).committed()
        done = Evaluations.load(self._folder)
        steps = done.pending([saved.step for saved in committed], EVERY, self._total, measure)
        for step in steps:
            if step in self._monitor.tried() or (step in self._late and not self._alone):
                continue
            file = predictions_of(self._folder, step, "beside")
            values = worker.evaluate_checkpoint(self._evaluator, step, file, final=False)
            self._monitor.made(Made(step, Evaluation(step, values, measure), [], file))

    def ready(self) -> int:
        self._evaluate()
        return len(self._monitor.unrecorded())

    def made(self) -> list[Made]:
        return self._monitor.unrecorded()

    def recorded(self, step: int) -> None:
        self._monitor.recorded(step)
        self.given.append(step)

    def end(self, waiting: Callable[[], None]) -> None:
        waiting()
        self._alone = True
        self._evaluate()


def run(settings: Config, beside: Callable[[Job], Any] = lambda job: None, stop: int = 0) -> Path:
    """Train, or go on. stop: leave after this step."""
    job = worlds.start(settings, World.current())
    job.beside = beside(job)
    if stop:
        job.signal = lambda: LEAVE if last_step(job.folder) >= stop - 1 else 0
    train(job)
    return run_folder(settings)


def last_step(folder: Path) -> int:
    lines = read_lines(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "eval.jsonl")


def warnings(folder: Path) -> list[tuple[int, str]]:
    events = read_lines(folder / "events.jsonl")
    return [(e["step"], e["reason"]) for e in events if e["event"] == "warning"]


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_lines(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def stopping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stops for its evaluations."""
    return run(config(tmp_path_factory.mktemp("beside"), "stopping"))


def beside(stopping: Path, name: str, **changes: Any) -> Config:
    return config(stopping.parent.parent, name, evaluate__beside=True, **changes)


def alike(folder: Path, stopping: Path) -> None:
    """Training, figures and answers of two runs are the same to the last digit."""
    assert losses(folder) == losses(stopping)
    ours, theirs = evaluations(folder), evaluations(stopping)
    assert sorted(line["step"] for line in ours) == [*DUE, STEPS]
    by_step = {line["step"]: line for line in ours}
    for line in theirs:
        assert by_step[line["step"]] == {**line, "checkpoint": True}
        name = predictions_of(folder, line["step"]).name
        answers = [(run / "predictions" / name).read_bytes() for run in (folder, stopping)]
        assert answers[0] == answers[1]
    assert not list((folder / "predictions").glob(".*"))


@pytest.mark.parametrize("late", [(), (6,)])
def test_training_and_figures_are_those_of_a_run_that_stops(
    stopping: Path, late: tuple[int, ...]
) -> None:
    """late: one that comes after a later one."""
    groups: list[Group] = []

    def group(job: Job) -> Group:
        groups.append(Group(job, late))
        return groups[0]

    folder = run(beside(stopping, f"beside_{len(late)}"), group)
    assert sorted(groups[0].given) == DUE
    alike(folder, stopping)


def test_what_nobody_evaluated_meanwhile_is_evaluated_at_the_end(stopping: Path) -> None:
    """By the workers that trained, whose model is then that of the last step again."""
    settings = beside(stopping, "alone")
    folder = run(settings)
    alike(folder, stopping)
    assert [line["final"] for line in evaluations(folder)] == [False, False, False, True]
    catalogue = Catalogue.of(settings.checkpoint, folder)
    assert [saved.step for saved in catalogue.committed()] == [STEPS]


def test_a_checkpoint_that_waits_for_its_evaluation_is_kept_until_then(stopping: Path) -> None:
    settings = beside(stopping, "left")
    folder = run(settings, stop=10)
    catalogue = Catalogue.of(settings.checkpoint, folder)
    assert [saved.step for saved in catalogue.committed()] == [*DUE, 10]
    assert evaluations(folder) == []
    draft = predictions_of(folder, 9, "000000.killed")  # by workers of an earlier start
    draft.parent.mkdir(exist_ok=True)
    draft.write_text("half a")
    run(settings, lambda job: Group(job))  # the next start makes up for them, once each
    alike(folder, stopping)
    assert [saved.step for saved in catalogue.committed()] == [STEPS]


def test_the_best_is_chosen_by_them(stopping: Path) -> None:
    """Losses fall, so with mode max the first is the best."""
    name = next(key for key in evaluations(stopping)[0] if key.startswith("loss/"))
    best = {"checkpoint__best": name, "checkpoint__best_mode": "max"}
    settings = beside(stopping, "best", **best)
    folder = run(settings, lambda job: Group(job))
    kept = [saved.step for saved in Catalogue.of(settings.checkpoint, folder).committed()]
    assert kept == [DUE[0], STEPS]


def test_a_checkpoint_that_is_damaged_is_told_of_and_passed_over(stopping: Path) -> None:
    settings = beside(stopping, "damaged")
    folder = run(settings, stop=10)
    (folder / "checkpoints" / "step_6" / "config.yaml").write_text("another")
    run(settings)
    assert sorted(line["step"] for line in evaluations(folder)) == [3, 9, STEPS]
    ((step, reason),) = warnings(folder)
    assert step == 6 and "config.yaml is not as it was written" in reason


class Told:
    """A group that has failed at 3, has figures of 6 twice, and of a step that is not done yet."""

    def __init__(self, measure: Measure) -> None:
        figures = {6: {"wer/dev": 0.5}, 11: {"wer/dev": 0.25}}
        made = [Made(step, Evaluation(step, found, measure)) for step, found in figures.items()]
        self._made = [Made(3, None, ["no room"]), made[0], made[0], made[1]]
        self.acknowledged: list[int] = []

    def ready(self) -> int:
        return len(self._made)

    def made(self) -> list[Made]:
        return self._made

    def recorded(self, step: int) -> None:
        self.acknowledged.append(step)
        self._made = [made for made in self._made if made.step != step]

    def end(self, waiting: Callable[[], None]) -> None:
        """Nothing."""


def test_what_is_told_is_recorded_once_and_never_ahead_of_training(stopping: Path) -> None:
    settings = beside(stopping, "told", train__max_steps=8)
    run(settings, stop=7)
    told: list[Told] = []

    def tell(job: Job) -> Told:
        assert job.evaluate is not None
        told.append(Told(job.evaluate.measure(False)))
        return told[0]

    folder = run(settings, tell)
    assert told[0].acknowledged == [3, 6, 6, 11]
    steps = [(line["step"], line["wer/dev"]) for line in evaluations(folder)]
    assert steps[0] == (6, 0.5) and [step for step, _ in steps] == [6, 3, 8]
    assert warnings(folder) == [(3, "no room")]
