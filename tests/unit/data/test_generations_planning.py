"""A run keeps the version of planning it began with, whatever joins its data."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from raysft.config.schema import Data, Source
from raysft.data.plan import plan
from raysft.data.plan.changes import facts
from raysft.data.plan.plan import Plan
from raysft.errors import UserError
from raysft.run import plans
from tests.support.generations import Run, names, refusal
from tests.support.indexes import most


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return most(tmp_path / "a.json", 40)


def test_a_plan_that_comes_out_otherwise_than_recorded_is_refused(run: Run, corpus: Path) -> None:
    run.start(corpus)
    run.train(3)
    tokens = Path(run.written()[0]["index"]) / "tokens.npy"
    meta = tokens.with_name("meta.json")
    meta.write_text(meta.read_text().replace('"hash": "', '"hash": "0'))
    with pytest.raises(UserError, match=r"comes out another now: its index in .* was altered"):
        plans.load(run.folder).start()


def rewritten(run: Run, **settings: object) -> None:
    """plan.json as another version of raysft would have written it."""
    known = run.written()
    for item in known:
        item["settings"].update(settings)
    (run.folder / "plan.json").write_text(json.dumps(known))


def test_a_run_of_a_later_planning_is_refused(run: Run, corpus: Path) -> None:
    run.start(corpus)
    run.train(3)
    rewritten(run, algorithm=plan.ALGORITHM + 1)
    told = refusal(run, corpus, extend=True)
    assert "planned by version 4 of raysft's planning, and this raysft knows 1, 2 and 3" in told
    with pytest.raises(UserError, match="planned by version 4"):
        plans.load(run.folder).start()


def begun_by_algorithm_1(run: Run, *paths: Path | Source, **data: object) -> Plan:
    """A run's folder as raysft left it when its planning was the first."""
    settings = Data(**{"lanes": 2, "tokens_per_batch": 40, "window": 8, **data})
    index = run.index(*paths)
    old = Plan.of(index, settings, 0, algorithm=1)
    (run.folder / "plan.json").write_text(json.dumps([facts(0, index, old)]))
    run.cursor = next(old.steps(old.start())).after
    return old


def test_a_run_of_the_first_planning_goes_on_under_it(run: Run, corpus: Path) -> None:
    old = begun_by_algorithm_1(run, corpus)
    before = run.written()
    found = run.start(corpus)
    assert run.written() == before
    assert isinstance(found.newest, Plan) and found.newest.hash == old.hash
    steps = zip(found.steps(run.cursor), itertools.islice(old.steps(run.cursor), 40))
    assert all(
        np.array_equal(mine, theirs)
        for a, b in steps
        for mine, theirs in zip(a.lanes, b.lanes, strict=True)
    )
    (run.folder / "plan.json").unlink()  # as before there was one
    assert run.start(corpus).newest.hash == old.hash
    (unnamed,) = run.written()  # what such a run has recorded are ids as they are
    assert unnamed == {key: value for key, value in before[0].items() if key != "names"}


def test_a_run_of_the_first_planning_keeps_it_for_data_that_joins(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    begun_by_algorithm_1(run, corpus)
    more = most(tmp_path / "b.json", 20, start=40)
    run.start(corpus, more, extend=True)
    assert [item["settings"]["algorithm"] for item in run.written()] == [1, 1]
    both = Plan.of(
        run.index(corpus, more), Data(lanes=2, tokens_per_batch=40, window=8), 0, algorithm=1
    )
    assert run.written()[1]["plan_hash"] == both.hash
    run.epoch()
    assert sorted(run.epoch()) == names(0, 60)


def test_a_new_run_is_of_the_newest_planning(run: Run, corpus: Path) -> None:
    run.start(corpus)
    assert run.written()[0]["settings"]["algorithm"] == plan.ALGORITHM == 3


def test_caps_temperature_and_mix_by_source_outlive_a_restart(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    few = Source(path=str(most(tmp_path / "b.json", 20, start=40)), max_examples=5)
    run.start(corpus, few, temperature={"T": 1.0})
    run.train(1)
    again = run.start(corpus, few, temperature={"T": 1.0})
    assert plans.load(run.folder).newest.hash == again.newest.hash
    seen = [run.epoch() for _ in range(5)]
    for one in seen[1:]:  # whole epochs
        assert len(one) == 45 and set(names(0, 40)) < set(one)
    assert {name for one in seen[1:] for name in one} == set(names(0, 60))
    told = refusal(run, corpus, Source(path=few.path, max_examples=6), temperature={"T": 1.0})
    assert "max_examples or max_hours of data.train are others" in told
    assert "data.temperature is {'T': 2.0, 'by': 'source'}, was {'T': 1.0" in refusal(
        run, corpus, few, temperature={"T": 2.0}
    )
    mixed = run.start(corpus, few, temperature={"T": 1.0}, mix={"a": 0.5, "b": 0.5}, extend=True)
    step = next(mixed.newest.steps(mixed.newest.start()))
    assert sorted(set(mixed.newest.source[lane].tolist()) for lane in step.lanes) == [{0}, {1}]


def test_a_run_of_an_earlier_planning_does_not_know_a_mix_by_source(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    begun_by_algorithm_1(run, corpus)
    more = most(tmp_path / "b.json", 20, start=40)
    with pytest.raises(UserError, match=r"data.mix by source: a run that began with an earlier"):
        run.start(corpus, more, mix={"a": 0.5, "b": 0.5}, extend=True)
