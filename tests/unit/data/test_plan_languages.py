"""Temperature by language: what is seen of each, whatever sources and tasks it is in."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from raysft.config.schema import Data
from raysft.data.plan.kinds import MAX_LANGUAGES, Languages
from raysft.data.plan.plan import Cursor, Plan, PlannedStep
from raysft.data.plan.shares import Wanted
from raysft.errors import UserError

NAMES = ("", "de", "en", "zu")
COUNTS = {"": 300, "de": 1500, "en": 4000, "zu": 100}
N = sum(COUNTS.values())
LANG = np.random.default_rng(1).permutation(np.repeat(np.arange(4), list(COUNTS.values())))
SOURCE = (np.arange(N) >= 3500).astype(np.int16)  # both have all languages
TASK = (np.random.default_rng(2).random(N) < 0.3).astype(np.int16)
BY_LANG = {"T": 2.0, "by": "lang"}


def plan(
    lang: np.ndarray = LANG,
    names: tuple[str, ...] = NAMES,
    weights: tuple[float, ...] = (1.0, 1.0),
    wanted: dict[str, Any] | None = None,
    algorithm: int = 3,
    **data: object,
) -> Plan:
    settings = {"lanes": 4, "tokens_per_batch": 1000, "window": 256, "temperature": BY_LANG}
    of = Data(**{**settings, **data})
    tokens = (10 + np.random.default_rng(0).random(len(lang)) * 80).astype(np.int32)
    asked = Wanted(list(weights), ("read", "talks"), **(wanted or {}))
    columns = tokens, TASK[: len(lang)], ("asr", "tts"), SOURCE[: len(lang)]
    languages = Languages(names, lang.astype(np.int32))
    more: dict[str, Any] = {"wanted": asked, "languages": languages}
    return Plan(*columns, weights, "index", of, 0, algorithm, **more)


def times(of: Plan, epoch: int = 0) -> np.ndarray:
    """How often each example is seen in an epoch."""
    steps = itertools.takewhile(lambda s: s.epoch <= epoch, of.steps(of.start()))
    rows = [np.concatenate(step.lanes) for step in steps if step.epoch == epoch]
    return np.bincount(np.concatenate(rows), minlength=N)


def powers(sizes: np.ndarray, t: float) -> np.ndarray:
    return sizes ** (1 / t) / (sizes ** (1 / t)).sum()


@pytest.mark.parametrize("t", [1.0, 2.0, 5.0])
def test_languages_have_shares_by_a_power_of_their_sizes(t: float) -> None:
    seen = times(plan(temperature={"T": t, "by": "lang"}))
    shares = np.bincount(LANG, seen) / seen.sum()
    assert shares == pytest.approx(powers(np.array(list(COUNTS.values())), t), abs=1e-3)
    assert set(seen[LANG == 2].tolist()) == {1}  # the largest, as its weight says
    assert seen.min() >= 1
    for lang in range(4):  # alike in all sources and tasks
        for other in (SOURCE, TASK):
            each = np.bincount(other, seen * (lang == LANG)) / np.bincount(other[lang == LANG])
            assert each == pytest.approx(each.mean(), rel=0.01)


def test_sizes_are_counted_with_weights_and_caps_come_last() -> None:
    weights = (1.0, 3.0)
    seen = times(plan(weights=weights))
    sizes = np.bincount(LANG, np.array(weights)[SOURCE])
    assert np.bincount(LANG, seen) / seen.sum() == pytest.approx(powers(sizes, 2.0), abs=1e-3)
    capped = times(plan(wanted={"max_examples": [700, None], "caps": [{"source": 0}]}))
    assert capped[SOURCE == 0].sum() == pytest.approx(700, abs=4)  # a fifth of each kind


def test_with_a_mix_by_task_each_group_has_its_lanes_and_its_languages_theirs() -> None:
    of = plan(mix={"asr": 0.75, "tts": 0.25})
    seen = np.zeros(N)
    for step in itertools.islice(of.steps(of.start()), 1500):
        assert sorted(set(TASK[lane].tolist()) == {1} for lane in step.lanes) == [0, 0, 0, 1]
        assert all(len(set(TASK[lane].tolist())) == 1 for lane in step.lanes)
        np.add.at(seen, np.concatenate(step.lanes), 1)
    sizes = np.array(list(COUNTS.values()))
    factor = (sizes / sizes.max()) ** (1 / 2.0 - 1)
    for task in (0, 1):
        own = np.bincount(LANG[task == TASK]) * factor
        found = np.bincount(LANG, seen * (task == TASK))
        assert found / found.sum() == pytest.approx(own / own.sum(), abs=0.01)


def test_with_a_mix_by_source_too() -> None:
    of = plan(mix={"read": 0.5, "talks": 0.5})
    seen = np.zeros(N)
    for step in itertools.islice(of.steps(of.start()), 500):
        assert sorted(set(SOURCE[lane].tolist()) == {1} for lane in step.lanes) == [0, 0, 1, 1]
        np.add.at(seen, np.concatenate(step.lanes), 1)
    rare, common = (seen[(lang == LANG) & (SOURCE == 0)].mean() for lang in (3, 2))
    assert rare / common == pytest.approx((100 / 4000) ** -0.5, rel=0.03)
    assert plan(mix={"read": 0.5, "asr": 0.25, "tts": 0.25}).hash != of.hash


def same(a: PlannedStep, b: PlannedStep) -> bool:
    return a.after == b.after and all(map(np.array_equal, a.lanes, b.lanes))


@pytest.mark.parametrize("mix", [{}, {"asr": 0.5, "tts": 0.5}])
def test_a_run_goes_on_from_any_step_as_it_would_have(mix: dict[str, float]) -> None:
    steps = list(itertools.islice(plan(mix=mix).steps(plan(mix=mix).start()), 230))
    assert steps[-1].epoch > 0
    for at in (0, 7, 100, 201):
        cursor = Cursor.from_json(json.loads(json.dumps(steps[at].after.to_json())))
        again = plan(mix=mix).steps(cursor)
        assert all(same(one, next(again)) for one in steps[at + 1 : at + 30])


def test_another_language_is_another_plan_only_where_it_counts() -> None:
    other = LANG.copy()
    other[np.flatnonzero(LANG == 1)[0]] = 2
    assert plan(other).hash != plan().hash
    assert plan(LANG, ("", "de", "en", "xh")).hash != plan().hash
    assert plan().hash == plan(LANG.copy()).hash
    for data in ({"temperature": None}, {"temperature": {"T": 2.0, "by": "task"}}):
        assert plan(other, **data).hash == plan(**data).hash
        assert plan(**data).languages is None


def test_data_that_cannot_be_counted_by_language_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data.temperature.by: lang: no example .* says its lang"):
        plan(np.zeros(N), ("",))
    many = tuple(f"l{number}" for number in range(MAX_LANGUAGES + 1))
    with pytest.raises(UserError, match=r"by: lang: .* name 1,001 languages \('l0', 'l1', 'l2', "):
        plan(np.arange(N) % len(many), many)
    with pytest.raises(UserError, match=r"temperature by lang: order sequential does not know it"):
        plan(order="sequential")
    with pytest.raises(UserError, match=r"temperature by lang: a run that began with an earlier"):
        plan(algorithm=2)


def test_the_plan_says_how_often_it_sees_which_language() -> None:
    of = plan()
    seen = np.bincount(LANG, times(of))
    told = of.dealt.languages()
    assert [one.name for one in told] == list(NAMES)
    assert [one.examples for one in told] == list(COUNTS.values())
    assert [one.seen for one in told] == pytest.approx(seen.tolist(), abs=5)
    assert [one.beside for one in told] == pytest.approx([seen.sum()] * 4, abs=20)
    assert plan(temperature={"T": 2.0}).dealt.languages() == []
    # of the groups of a mix those that the language is in
    lone = np.where(TASK == 1, 3, 2)
    mixed = plan(lone, mix={"asr": 0.5, "tts": 0.5}).dealt.languages()
    assert [one.seen / one.beside for one in mixed] == [1.0, 1.0]


def test_memory_of_a_plan_does_not_grow_by_a_column() -> None:
    peaks = []
    sizes = (2_000_000, 6_000_000)
    for n in sizes:
        rng = np.random.default_rng(0)
        lang, task = rng.integers(0, 4, n, np.int32), rng.integers(0, 2, n, np.int16)
        tokens, source = np.full(n, 50, np.int32), np.zeros(n, np.int16)
        data = Data(lanes=4, tokens_per_batch=1000, temperature=BY_LANG)
        more: dict[str, Any] = {"languages": Languages(NAMES, lang), "wanted": Wanted([1.0])}
        tracemalloc.start()
        Plan(tokens, task, ("asr", "tts"), source, [1.0], "index", data, 0, **more)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Eight kinds: 12 bytes each a block of 64 examples, and what orders the blocks.
    assert peaks[1] - peaks[0] < 2.5 * (sizes[1] - sizes[0])
