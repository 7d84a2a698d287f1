"""Weights, temperature, mixes and caps: how often what is seen, and what that costs."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest

from raysft.config.schema import Data
from raysft.data.plan import scatter
from raysft.data.plan.plan import Plan, PlannedStep
from raysft.data.plan.shares import Wanted, explained
from raysft.errors import UserError

SIZES = (4000, 1000, 250)  # of three sources
NAMES = ("large", "middle", "small")
SOURCE = np.repeat([0, 1, 2], SIZES).astype(np.int16)


def lengths(n: int) -> np.ndarray:
    draws = np.random.default_rng(0).lognormal(1.6, 0.7, n)
    return (np.clip(draws, 0.3, 35) * 10).astype(np.int32)


def plan(
    source: np.ndarray = SOURCE,
    task: np.ndarray | None = None,
    tasks: tuple[str, ...] = ("asr",),
    weights: tuple[float, ...] = (1.0, 1.0, 1.0),
    names: tuple[str, ...] = NAMES,
    algorithm: int = 3,
    wanted: dict[str, Any] | None = None,
    **data: object,
) -> Plan:
    tokens = lengths(len(source))
    settings = Data(**{"lanes": 4, "tokens_per_batch": 1000, "window": 256, **data})
    task = np.zeros(len(source), np.int16) if task is None else task
    asked = Wanted(list(weights), names, **(wanted or {}))
    columns = tokens, task, tasks, source
    return Plan(*columns, weights, "index", settings, 0, algorithm, wanted=asked)


def epoch(of: Plan, number: int = 0) -> list[PlannedStep]:
    steps = itertools.takewhile(lambda s: s.epoch <= number, of.steps(of.start()))
    return [step for step in steps if step.epoch == number]


def times(of: Plan, number: int = 0) -> np.ndarray:
    """How often each example is seen in an epoch."""
    rows = np.concatenate([lane for step in epoch(of, number) for lane in step.lanes])
    return np.bincount(rows, minlength=len(of.source))


# -- the order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 1000, 65_537])
def test_an_order_that_is_not_listed_has_everything_once(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter, "LISTED", 0)
    order = scatter.scattered(n, "a", n)
    places = np.arange(n)
    assert sorted(order(places).tolist()) == places.tolist()
    assert order(places[n // 2 :]).tolist() == order(places)[n // 2 :].tolist()
    if n >= 1000:
        assert order(places).tolist() != scatter.scattered(n, "b", n)(places).tolist()


def test_an_order_that_is_not_listed_is_as_ever_and_random() -> None:
    order = scatter.scattered(10**8, 7, "order", 0, 0)
    # Part of every run's ledger: if these change, raise plan.ALGORITHM.
    assert order(np.arange(4)).tolist() == RECORDED
    found = order(np.arange(10**6))
    counts = np.histogram(found, 1000, (0, 10**8))[0]
    assert 0.8 < counts.var() / 1000 < 1.2
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.005
    assert abs(np.corrcoef(np.arange(10**6), found)[0, 1]) < 0.005
    near = np.abs(np.diff(found)) < 10**5  # of neighbours by chance 0.2%
    assert 0.0017 < near.mean() < 0.0023


RECORDED = [83527939, 15817211, 32735616, 60426586]


def speakers_met(of: Plan, speaker: np.ndarray, steps: int) -> float:
    """Pairs of one speaker in a step, over how many a free shuffle has."""
    met = pairs = 0.0
    for step in itertools.islice(of.steps(of.start()), steps):
        rows = np.concatenate(step.lanes)
        each = np.unique(speaker[rows], return_counts=True)[1]
        met += float((each * (each - 1) / 2).sum())
        pairs += len(rows) * (len(rows) - 1) / 2
    sizes = np.bincount(speaker).astype(np.float64)
    chance = (sizes * (sizes - 1)).sum() / (len(speaker) * (len(speaker) - 1.0))
    return met / (pairs * chance)


@pytest.mark.parametrize("listed", [1 << 20, 0])
def test_speakers_of_a_sorted_corpus_meet_in_a_step_as_by_chance(
    listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter, "LISTED", listed)
    sizes = np.random.default_rng(0).integers(100, 300, 1000)
    speaker = np.repeat(np.arange(1000), sizes)
    source = np.zeros(len(speaker), np.int16)
    of = plan(source, weights=(1.0,), names=("one",), lanes=16, tokens_per_batch=3000, window=4096)
    assert 0.8 < speakers_met(of, speaker, 200) < 1.25
    old = plan(
        source,
        weights=(1.0,),
        names=("one",),
        algorithm=1,
        lanes=16,
        tokens_per_batch=3000,
        window=4096,
    )
    assert speakers_met(old, speaker, 40) > 10  # else nothing was shown


def test_tasks_that_alternate_are_drawn_each_for_itself() -> None:
    task = (np.arange(len(SOURCE)) % 3 == 0).astype(np.int16)
    of = plan(task=task, tasks=("asr", "tts"), mix={"asr": 0.5, "tts": 0.5})
    assert set(times(of)[task == 0]) <= {1, 2}
    for step in itertools.islice(of.steps(of.start()), 50):
        assert sorted(set(task[lane].tolist()) == {1} for lane in step.lanes) == [0, 0, 1, 1]


# -- weights -----------------------------------------------------------------------------------


def test_memory_and_time_of_a_plan_do_not_grow_with_a_weight() -> None:
    peaks = []
    source = np.repeat([0, 1], [300_000, 300]).astype(np.int16)
    for weight in (1.0, 20_000.5):
        tracemalloc.start()
        of = plan(source, weights=(1.0, weight), names=("a", "b"), window=4096)
        rows = np.concatenate(
            [np.concatenate(s.lanes) for s in itertools.islice(of.steps(of.start()), 40)]
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        share = 300 * weight / (300_000 + 300 * weight)
        assert (source[rows] == 1).mean() == pytest.approx(share, abs=0.02)
    assert peaks[1] < 1.1 * peaks[0]


def test_a_weight_is_exact_over_epochs() -> None:
    of = plan(weights=(1.0, 2.3, 0.1))
    seen = sum(times(of, number) for number in range(10))
    assert set(seen[:4000].tolist()) == {10}
    assert set(seen[4000:5000].tolist()) == {23}
    assert set(seen[5000:].tolist()) == {1}


def test_an_epoch_that_is_a_thousand_times_as_long_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.train.0.weight: 1500: .*Leave weights out"):
        plan(weights=(1500.0, 1500.0, 1500.0))


def test_weights_that_are_hours_or_counts_are_explained() -> None:
    told = explained((9.6, 1.0, 0.4), (281_241, 28_539, 13_100), (960.9, 100.6, 40.2))
    assert told.startswith("the weights 9.6, 1, 0.4 are as the sources' hours are. ")
    assert "would be 99%, 1%, 0% of what is seen" in told
    assert "Without weights they are 87%, 9%, 4%" in told
    assert "numbers of examples" in explained((2.8, 0.3), (281_241, 28_539), (900.0, 3.0))
    assert explained((1.0, 1.0), (1000, 1000), (1.0, 1.0)) == ""
    assert explained((2.0, 1.0), (1000, 1000), (1.0, 1.0)) == ""
    assert explained((2.0, 1.0), (1000, 3000), (0.0, 0.0)) == ""
    assert explained((3.0,), (3000,), (3.0,)) == ""


# -- temperature -------------------------------------------------------------------------------


def shares(of: Plan) -> np.ndarray:
    seen = times(of)
    counts = np.bincount(of.source, seen)
    return counts / counts.sum()


@pytest.mark.parametrize("t", [1.0, 2.0, 5.0])
def test_with_a_temperature_sources_have_shares_by_a_power_of_their_sizes(t: float) -> None:
    of = plan(temperature={"T": t})
    wanted = np.array(SIZES) ** (1 / t)
    assert shares(of) == pytest.approx(wanted / wanted.sum(), abs=1e-3)
    assert set(times(of)[:4000].tolist()) == {1}  # the largest, as its weight says
    weighted = plan(weights=(1.0, 1.0, 4.0), temperature={"T": t})
    wanted = (np.array(SIZES) * [1, 1, 4]) ** (1 / t)
    assert shares(weighted) == pytest.approx(wanted / wanted.sum(), abs=1e-3)


def test_with_a_temperature_by_task_tasks_have_them() -> None:
    task = (np.arange(len(SOURCE)) % 16 == 0).astype(np.int16)
    of = plan(task=task, tasks=("asr", "tts"), temperature={"T": 2.0, "by": "task"})
    seen = np.bincount(task, times(of))
    assert seen[0] / seen[1] == pytest.approx(15**0.5, rel=0.01)
    with pytest.raises(UserError, match=r"temperature by task: order sequential does not know it"):
        plan(temperature={"T": 2.0, "by": "task"}, order="sequential")


def test_a_temperature_is_part_of_the_plan() -> None:
    assert plan().hash != plan(temperature={"T": 2.0}).hash
    assert "temperature" not in plan().settings
    assert plan(temperature={"T": 2.0}).settings["temperature"] == {"T": 2.0, "by": "source"}


# -- mix by source -----------------------------------------------------------------------------


def test_a_mix_may_name_sources_and_tasks() -> None:
    task = np.where(SOURCE == 0, np.arange(len(SOURCE)) % 2, 0).astype(np.int16)
    of = plan(task=task, tasks=("asr", "tts"), lanes=8, mix={"small": 1.0, "asr": 2.0, "tts": 1.0})
    for step in itertools.islice(of.steps(of.start()), 100):
        kinds = [
            "small" if set(SOURCE[lane].tolist()) == {2} else f"task {task[lane[0]]}"
            for lane in step.lanes
        ]
        assert sorted(kinds) == ["small"] * 2 + ["task 0"] * 4 + ["task 1"] * 2
        assert all(len(set(task[lane].tolist())) == 1 for lane in step.lanes)
    seen = times(of)
    assert seen.min() >= 1


def test_a_mix_that_cannot_be_meant_is_refused() -> None:
    task = (SOURCE == 2).astype(np.int16)
    both: dict[str, Any] = {"task": task, "tasks": ("asr", "tts")}
    with pytest.raises(UserError, match=r"data.mix.midle: is no .*did you mean middle\?"):
        plan(**both, mix={"midle": 1.0, "large": 1.0, "small": 1.0})
    with pytest.raises(UserError, match="says nothing of asr of middle: name the source or"):
        plan(**both, mix={"large": 0.5, "small": 0.5})
    with pytest.raises(UserError, match=r"data.mix.tts: has no example"):
        plan(**both, mix={"large": 0.5, "small": 0.25, "middle": 0.25, "tts": 1.0})
    names = ("large", "asr", "small")
    with pytest.raises(UserError, match=r"data.mix.asr: is the name of a source and of a task"):
        plan(**both, names=names, mix={"asr": 0.5, "tts": 0.5})
    # of the same examples it is no matter
    assert plan(**both, names=("large", "middle", "tts"), mix={"asr": 0.5, "tts": 0.5})
    with pytest.raises(UserError, match=r"data.mix by source: order sequential does not know it"):
        plan(**both, mix={"large": 0.5, "asr": 0.5, "tts": 0.5}, order="sequential")


# -- caps --------------------------------------------------------------------------------------


def test_a_cap_takes_another_part_every_epoch_until_all_was_seen() -> None:
    of = plan(wanted={"max_examples": [1000, None, 100], "caps": [{"source": 0}]})
    every = [times(of, number) for number in range(4)]
    for seen in every:
        assert seen[:4000].sum() == 1000
        assert set(seen[4000:5000].tolist()) == {1}
        assert seen[5000:].sum() == 100
    assert set(sum(every)[:4000].tolist()) == {1}
    assert of.hash != plan().hash


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_a_cap_of_hours_is_a_share_of_what_there_is(order: str) -> None:
    of = plan(wanted={"passes": [0.25, None, 3.0]}, order=order)
    seen = times(of)
    assert seen[:4000].sum() == pytest.approx(1000, abs=64)
    assert set(seen[5000:].tolist()) == {1}  # a cap makes nothing more
