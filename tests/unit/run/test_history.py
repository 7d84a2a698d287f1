"""Where new data begins is decided by who owns the run, from where the run really stands."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from raysft.config import Config
from raysft.data.plan.plan import Cursor, PlannedStep
from raysft.driver.preflight import prepare
from raysft.errors import UserError
from raysft.run import plans
from raysft.run.folder import open_run
from tests.support.worlds import tiny


def grow(corpus: Path, count: int, name: str = "new") -> None:
    items = json.loads(corpus.read_bytes())
    items += [{"id": f"{name}{i}", "input": "[Hu1]", "output": "more"} for i in range(count)]
    corpus.write_text(json.dumps(items))


def extended(config: Config) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"extend": True})})


def epochs(run: Path) -> list[int]:
    return [item["from_epoch"] for item in json.loads((run / plans.NAME).read_bytes())]


@pytest.fixture
def behind(tmp_path: Path) -> tuple[Config, Path, list[PlannedStep]]:
    """A run in which an older version let a second driver decide, from a checkpoint near the end of
    epoch 0, that data is new from epoch 1 on, while the first went on; and the steps of that."""
    config = tiny(tmp_path, train__max_steps=None, train__epochs=4)
    run = open_run(config)
    first = prepare(config, run).plan
    steps = list(itertools.islice(first.steps(first.start()), 60))
    early = sum(step.epoch == 0 for step in steps) - 3
    grow(tmp_path / "units.json", 20)
    prepare(extended(config), run, steps[early].after)
    assert epochs(run) == [0, 1]
    return config, run, steps


def at(steps: list[PlannedStep], epoch: int, inside: bool) -> Cursor:
    """A cursor of the first driver: in the middle of an epoch, or where it begins."""
    first = next(n for n, step in enumerate(steps) if step.epoch == epoch)
    return steps[first + 2 if inside else first - 1].after


@pytest.mark.parametrize("extend", [True, False])
@pytest.mark.parametrize(("epoch", "inside", "begins"), [(1, True, 2), (2, False, 2), (2, True, 3)])
def test_a_run_that_went_beyond_where_its_new_data_was_to_begin_goes_on_from_where_it_stands(
    epoch: int,
    inside: bool,
    begins: int,
    extend: bool,
    behind: tuple[Config, Path, list[PlannedStep]],
) -> None:
    """No epoch comes again, and what was begun is finished as it was planned."""
    config, run, steps = behind
    cursor = at(steps, epoch, inside)
    with pytest.raises(UserError):
        next(plans.load(run).steps(cursor))
    plan = prepare(extended(config) if extend else config, run, cursor).plan
    assert epochs(run) == [0, begins]
    goes_on = list(itertools.islice(plan.steps(cursor), 40))
    assert [step.step for step in goes_on] == list(range(cursor.step + 1, cursor.step + 41))
    order = [step.epoch for step in goes_on]
    assert order == sorted(order) and order[0] == epoch
    planned = {step.step: [rows.tolist() for rows in step.lanes] for step in steps}
    for step in goes_on:
        rows = [lane.tolist() for lane in step.lanes]
        if step.epoch < begins:
            assert rows == planned[step.step]
        else:
            assert min(itertools.chain(*rows)) >= 60, "rows of the new data's index"
    assert epochs(run) == epochs_again(config, run, cursor)


def epochs_again(config: Config, run: Path, cursor: Cursor) -> list[int]:
    prepare(config, run, cursor)
    return epochs(run)


def test_an_edge_where_the_new_data_begins_changes_nothing(
    behind: tuple[Config, Path, list[PlannedStep]],
) -> None:
    config, run, steps = behind
    before = (run / plans.NAME).read_bytes()
    prepare(config, run, at(steps, 1, inside=False))
    assert (run / plans.NAME).read_bytes() == before


def test_yet_other_data_begins_after_the_epoch_under_way(
    behind: tuple[Config, Path, list[PlannedStep]], tmp_path: Path
) -> None:
    config, run, steps = behind
    cursor = at(steps, 1, inside=True)
    grow(tmp_path / "units.json", 5, "newer")
    prepare(extended(config), run, cursor)
    assert epochs(run) == [0, 2]
    assert plans.load(run).parts[1].examples == 85


def test_who_no_longer_owns_the_run_writes_no_plan(
    behind: tuple[Config, Path, list[PlannedStep]],
) -> None:
    config, run, steps = behind
    before = (run / plans.NAME).read_bytes()

    class Taken:
        def require(self) -> None:
            raise UserError("another job has taken over this run")

    with pytest.raises(UserError, match="taken over"):
        prepare(config, run, at(steps, 1, inside=True), permit=Taken())
    assert (run / plans.NAME).read_bytes() == before
