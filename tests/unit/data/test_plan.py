"""plan: promises a user relies on, each on a small index held in memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from raysft.config.schema import Data
from raysft.data.plan import scatter, windows
from raysft.data.plan.plan import Cursor, Plan, PlannedStep
from raysft.errors import UserError


def lengths(n: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).lognormal(1.6, 0.7, n)
    return (np.clip(draws, 0.3, 35) * 10).astype(np.int32)


def plan(
    tokens: np.ndarray,
    task: np.ndarray | None = None,
    tasks: tuple[str, ...] = ("asr",),
    source: np.ndarray | None = None,
    weights: tuple[float, ...] = (1.0,),
    index: str = "index",
    seed: int = 0,
    **data: object,
) -> Plan:
    none = np.zeros(len(tokens), np.int16)
    settings = Data(**{"lanes": 4, "tokens_per_batch": 1000, "window": 256, **data})
    return Plan(
        tokens,
        none if task is None else task,
        tasks,
        none if source is None else source,
        weights,
        index,
        settings,
        seed,
    )


def epoch(a_plan: Plan, number: int = 0) -> list[PlannedStep]:
    steps = itertools.takewhile(lambda s: s.epoch <= number, a_plan.steps(a_plan.start()))
    return [step for step in steps if step.epoch == number]


def rows(steps: list[PlannedStep]) -> list[int]:
    return [int(row) for step in steps for lane in step.lanes for row in lane]


def shown(steps: list[PlannedStep]) -> list[list[list[int]]]:
    return [[lane.tolist() for lane in step.lanes] for step in steps]


def two_tasks(n: int, share: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share).astype(np.int16)


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_an_epoch_has_every_example_once(mode: str, order: str) -> None:
    a_plan = plan(lengths(3000), mode=mode, order=order)
    for number in range(2):
        assert sorted(rows(epoch(a_plan, number))) == list(range(3000))


def test_steps_count_from_1_over_the_whole_run_and_epochs_from_0() -> None:
    a_plan = plan(lengths(500))
    count = [a_plan.count_steps(0), a_plan.count_steps(1)]
    steps = list(itertools.islice(a_plan.steps(a_plan.start()), sum(count)))
    assert [step.step for step in steps] == list(range(1, sum(count) + 1))
    assert [step.epoch for step in steps] == [0] * count[0] + [1] * count[1]
    assert [step.after.step for step in steps] == [step.step for step in steps]


def trained(a_plan: Plan, worlds: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """The ledger of a run of [(workers, steps), ...]: every restart begins at the last cursor."""
    ledger, cursor = {}, a_plan.start()
    for workers, count in worlds:
        for worker in range(workers):
            for step in itertools.islice(a_plan.steps(cursor), count):
                for lane in range(worker, len(step.lanes), workers):
                    ledger[step.step, lane] = step.lanes[lane].tolist()
        cursor = step.after
    return ledger


def test_plan_is_the_same_for_every_world_size() -> None:
    a_plan = plan(lengths(3000), lanes=6)
    alone = trained(a_plan, [(1, 24)])
    assert len(alone) == 24 * 6
    for workers in (2, 3, 4, 5, 6):
        assert trained(a_plan, [(workers, 24)]) == alone
    assert trained(a_plan, [(4, 5), (1, 1), (3, 11), (6, 7)]) == alone


def test_plan_is_the_same_in_another_process_and_as_ever() -> None:
    # These numbers are part of every run's ledger: if they change, raise plan.ALGORITHM.
    code = (
        "import numpy as np\n"
        "from raysft.config.schema import Data\n"
        "from raysft.data.plan.plan import Plan\n"
        "z = np.zeros(40, np.int16)\n"
        "data = Data(lanes=2, tokens_per_batch=30, window=16)\n"
        "plan = Plan(np.arange(40, dtype=np.int32) % 11 + 1, z, ['a'], z, [1.0], 'i', data, 7)\n"
        "step = next(plan.steps(plan.start()))\n"
        "print(plan.hash[:16], [lane.tolist() for lane in step.lanes])\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == EXPECTED


EXPECTED = "90a360c2cac30911 [[9, 17, 16, 4, 12], [18, 29, 6, 34, 33, 22]]"


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    tokens = lengths(1000)
    first, again = plan(tokens), plan(tokens)
    assert shown(epoch(first)) == shown(epoch(again))
    assert shown(epoch(first, 0)) != shown(epoch(first, 1))
    assert shown(epoch(first)) != shown(epoch(plan(tokens, seed=1)))


def test_shuffling_reaches_over_the_whole_epoch() -> None:
    order = np.array(rows(epoch(plan(lengths(5000), window=512))))
    early = order[:500]
    assert early.min() < 500
    assert early.max() > 4500
    assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 0.2


def speakers(n: int) -> np.ndarray:
    """A property of each example that its speaker has: runs of 64, as corpora are sorted."""
    draws = np.random.default_rng(5).standard_normal(n // 64 + 1)
    return np.repeat(draws, 64)[:n]


def variance_over_true_permutation(steps: list[PlannedStep], values: np.ndarray) -> float:
    """Of a step's mean value, for steps as large as these."""
    taken = [np.concatenate(step.lanes) for step in steps[:-1]]
    found = np.var([values[rows].mean() for rows in taken])
    rng = np.random.default_rng(0)
    true = []
    for _ in range(10):
        order, at = rng.permutation(len(values)), 0
        for rows in taken:
            true.append(values[order[at : at + len(rows)]].mean())
            at += len(rows)
    return float(found / np.var(true))


def test_steps_of_a_sorted_corpus_are_as_mixed_as_under_a_true_permutation() -> None:
    n = 200_000  # 260 steps of 750 examples; neighbours kept together would make it 18
    steps = epoch(plan(lengths(n), lanes=16, tokens_per_batch=2900, window=4096))
    assert 250 < len(steps) < 300
    assert variance_over_true_permutation(steps, speakers(n)) < 1.25


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "budget"), [(16, 8192), (64, 16384)])
def test_steps_of_a_sorted_million_are_as_mixed_as_under_a_true_permutation(
    lanes: int, budget: int
) -> None:
    n = 10**6
    factors = [
        variance_over_true_permutation(
            epoch(plan(seconds(n), lanes=lanes, tokens_per_batch=budget, window=4096, seed=seed)),
            speakers(n),
        )
        for seed in range(3)
    ]
    assert np.mean(factors) < 1.2


def seconds(n: int) -> np.ndarray:
    """Positions of speech at 25 a second behind a prompt of 20."""
    draws = np.random.default_rng(0).lognormal(np.log(5), 0.7, n)
    return ((np.clip(draws, 0.5, 30) * 25).astype(int) + 20).astype(np.int32)


@pytest.mark.parametrize("n", [500, 4096, 20_000])
def test_pairs_of_a_row_meet_again_in_the_next_epoch_hardly_more_often_than_by_chance(
    n: int,
) -> None:
    ratios = []
    for seed in range(21 if n == 500 else 1):
        a_plan = plan(seconds(n), lanes=8, tokens_per_batch=2000, window=4096, seed=seed)
        row_of = np.zeros((2, n), np.int64)
        for number in range(2):
            lanes = [lane for step in epoch(a_plan, number) for lane in step.lanes]
            for row, lane in enumerate(lanes):
                row_of[number, lane] = row
        pairs = [np.bincount(rows) for rows in (*row_of, row_of[0] * n + row_of[1])]
        first, second, both = ((counts * (counts - 1) / 2).sum() for counts in pairs)
        ratios.append(both / (first * second / (n * (n - 1) / 2)))
    # Of 500 a few in a hundred fill no even rows in either epoch, and then meet 30 times as often.
    assert np.median(ratios) < 2
    assert np.mean(np.array(ratios) >= 10) < 0.1


@pytest.fixture
def many_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes more than a million examples, with thousands: an order that is not listed, many
    stretches."""
    monkeypatch.setattr(scatter, "LISTED", 100)
    monkeypatch.setattr(windows, "STRETCH", 2048)


@pytest.mark.usefixtures("many_examples")
@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_more_examples_than_are_listed_are_planned_once_each_and_go_on_from_anywhere(
    mode: str,
) -> None:
    task = two_tasks(9000, 0.3)
    mixed = plan(lengths(9000), task, ("a", "b"), mix={"a": 1.0, "b": 1.0}, mode=mode)
    assert set(rows(epoch(mixed))) == set(range(9000))
    source = np.repeat([0, 1], 4500)
    a_plan = plan(lengths(9000), source=source, weights=(1.0, 1.5), mode=mode, window=300)
    first = epoch(a_plan)
    seen = np.bincount(rows(first), minlength=9000)
    assert set(seen[:4500]) == {1} and set(seen[4500:]) == {1, 2}
    assert abs(seen[4500:].sum() - 6750) < 20
    for at in (0, 3, 17, len(first) // 2, len(first) - 2):
        rest = itertools.islice(a_plan.steps(first[at].after), 3)
        assert shown(list(rest))[: len(first) - at - 1] == shown(first[at + 1 : at + 4])


@pytest.mark.usefixtures("many_examples")
def test_windows_of_many_stretches_leave_no_half_empty_rows_and_are_mixed() -> None:
    n = 40_000
    a_plan = plan(lengths(n), tokens_per_batch=2000, window=512)
    assert a_plan.summary().unfilled < 0.03
    where = np.zeros(n, int)
    for step in epoch(a_plan):
        where[np.concatenate(step.lanes)] = step.step
    together = (where[:-1] == where[1:]).mean()
    assert together < 3 * np.mean(np.bincount(where)) / n


def test_sequential_order_is_the_order_of_the_index_in_every_epoch() -> None:
    for mode in ("packed", "padded"):
        a_plan = plan(lengths(1000), order="sequential", mode=mode)
        assert rows(epoch(a_plan, 0)) == list(range(1000))
        assert rows(epoch(a_plan, 1)) == list(range(1000))


def test_the_last_step_of_an_epoch_may_have_empty_lanes_and_drops_nothing() -> None:
    steps = epoch(plan(np.full(9, 10, np.int32), tokens_per_batch=20, lanes=4))
    assert [sorted(map(len, step.lanes)) for step in steps] == [[1, 2, 2, 2], [0, 0, 0, 2]]
    assert all(lane.dtype == np.int64 for step in steps for lane in step.lanes)


def test_an_example_longer_than_the_budget_is_listed_and_never_planned() -> None:
    tokens = lengths(1000)
    tokens[[3, 500, 999]] = 1001
    a_plan = plan(tokens)
    assert a_plan.oversize.tolist() == [3, 500, 999]
    assert a_plan.oversize.dtype == np.int64
    assert sorted([*rows(epoch(a_plan)), 3, 500, 999]) == list(range(1000))


def test_packed_windows_leave_no_half_empty_rows() -> None:
    # 2,048 examples fill 21.6 micro-batches: without the remainder moving on, 1.8% is wasted.
    tokens = lengths(50_000) * 10
    summary = plan(tokens, tokens_per_batch=60_000, window=2048).summary()
    assert summary.unfilled < 0.005
    assert summary.padding == 0
    assert summary.tokens == int(tokens.sum())


def test_padded_mode_pads_little_and_a_larger_window_pads_less() -> None:
    tokens = lengths(50_000) * 10
    small, large = (
        plan(tokens, tokens_per_batch=60_000, window=window, mode="padded").summary().padding
        for window in (2048, 8192)
    )
    assert large < 0.025 < small < 0.075


def test_mix_holds_exactly_in_every_step_where_it_can() -> None:
    task = two_tasks(4000, 0.2)
    a_plan = plan(lengths(4000), task, ("asr", "tts"), lanes=8, mix={"asr": 3.0, "tts": 1.0})
    for step in itertools.islice(a_plan.steps(a_plan.start()), 200):
        of_task = [set(task[lane].tolist()) for lane in step.lanes]
        assert of_task.count({0}) == 6
        assert of_task.count({1}) == 2


def test_mix_between_whole_lanes_holds_within_one_lane_and_on_average() -> None:
    task = two_tasks(4000, 0.5)
    mix = {"asr": 0.7, "tts": 0.3}
    a_plan = plan(lengths(4000), task, ("asr", "tts"), lanes=5, mix=mix)
    lanes = [
        sum(int(task[lane[0]] == 1) for lane in step.lanes)
        for step in itertools.islice(a_plan.steps(a_plan.start()), 1000)
    ]
    assert set(lanes) == {1, 2}
    assert abs(sum(lanes) - 1500) <= 3


def test_mixed_epoch_ends_when_every_task_has_been_seen_whole() -> None:
    task = two_tasks(2000, 0.1)
    a_plan = plan(lengths(2000), task, ("asr", "tts"), mix={"asr": 0.5, "tts": 0.5})
    assert set(rows(epoch(a_plan))) == set(range(2000))
    assert all(len(lane) for step in epoch(a_plan) for lane in step.lanes)
    times = np.bincount(rows(epoch(a_plan)), minlength=2000)
    # The small task goes round and round, evenly; the large one hardly begins again.
    assert np.ptp(times[task == 1]) <= 1
    assert times[task == 1].min() >= 5
    assert (times[task == 0] == 1).mean() > 0.95


def test_mix_that_names_other_tasks_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"names the tasks asr, st, the training data has asr, tts"):
        plan(lengths(100), two_tasks(100, 0.5), ("asr", "tts"), mix={"asr": 0.5, "st": 0.5})
    with pytest.raises(UserError, match=r"data has asr: add data of tts .*task: tts}\), or remove"):
        plan(lengths(100), np.zeros(100, int), ("asr",), mix={"asr": 0.5, "tts": 0.5})
    with pytest.raises(UserError, match=r"data has asr, tts: name tts in data.mix too, or r"):
        plan(lengths(100), two_tasks(100, 0.5), ("asr", "tts"), mix={"asr": 1.0})


def test_mix_that_cannot_hold_in_every_step_is_refused_with_the_lanes_it_needs() -> None:
    task, tasks, mix = two_tasks(100, 0.5), ("asr", "tts"), {"asr": 0.9, "tts": 0.1}
    with pytest.raises(UserError, match=r"data.lanes=4 .* use data.lanes=10 or more"):
        plan(lengths(100), task, tasks, mix=mix)
    plan(lengths(100), task, tasks, mix=mix, lanes=10)


def test_budget_smaller_than_every_example_is_refused() -> None:
    with pytest.raises(UserError, match=r"tokens_per_batch=5 .* shortest takes 7 positions"):
        plan(np.array([7, 9], np.int32), tokens_per_batch=5)
    tokens = np.array([1, 9], np.int32)
    with pytest.raises(UserError, match="every example of task tts"):
        plan(
            tokens,
            np.array([0, 1], np.int16),
            ("asr", "tts"),
            tokens_per_batch=5,
            mix={"asr": 1.0, "tts": 1.0},
        )


def test_no_examples_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to train on"):
        plan(np.zeros(0, np.int32))


def test_source_weights_say_how_often_examples_are_seen() -> None:
    source = np.repeat([0, 1, 2], 400).astype(np.int16)
    a_plan = plan(lengths(1200), source=source, weights=(1.0, 2.0, 0.5))
    first, second = (np.bincount(rows(epoch(a_plan, n)), minlength=1200) for n in (0, 1))
    assert set(first[:400]) == {1}
    assert set(first[400:800]) == {2}
    assert first[800:].sum() == 200
    # Another half each epoch: two epochs at 0.5 are one pass.
    assert set((first + second)[800:]) == {1}


def test_weights_that_are_counts_or_hours_are_refused_before_they_are_written_out() -> None:
    source = np.repeat([0, 1], [12_000, 8_000])
    tracemalloc.start()
    with pytest.raises(UserError, match=r"data.train.0.weight: 281241: each of its 12,000") as told:
        plan(lengths(20_000), source=source, weights=(281_241.0, 28_539.0))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    # 281,241 clips seen of 12,000 against 28,539 of 8,000
    assert str(told.value).endswith("as shares of what is seen yours would be weight 1, 0.152")
    small = plan(lengths(100), source=np.repeat([0, 1], 50), weights=(300.0, 12.5))
    assert small.count_steps(0) > 0, "a small source may be seen often"


def test_a_source_too_small_for_its_weight_waits_for_its_turn() -> None:
    a_plan = plan(np.array([5], np.int32), weights=(0.25,))
    steps = list(itertools.islice(a_plan.steps(a_plan.start()), 3))
    assert [step.epoch for step in steps] == [0, 4, 8]
    assert [a_plan.count_steps(n) for n in range(9)] == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert [a_plan.start(epoch).epoch for epoch in range(6)] == [0, 4, 4, 4, 4, 8]


def test_summary_counts_what_the_steps_hold() -> None:
    tokens, task = lengths(2000), two_tasks(2000, 0.3)
    a_plan = plan(tokens, task, ("asr", "tts"), mode="padded")
    for number in range(2):
        summary, steps = a_plan.summary(number), epoch(a_plan, number)
        lanes = [lane for step in steps for lane in step.lanes if len(lane)]
        assert summary.steps == a_plan.count_steps(number) == len(steps)
        assert summary.micro_batches == len(lanes)
        assert summary.examples == 2000
        assert summary.tokens == tokens.sum()
        assert summary.tokens_by_task == {
            "asr": tokens[task == 0].sum(),
            "tts": tokens[task == 1].sum(),
        }
        assert summary.computed == sum(len(lane) * int(tokens[lane].max()) for lane in lanes)
        assert summary.budget == 1000 * len(lanes)


def test_cursor_survives_json() -> None:
    a_plan = plan(lengths(500), two_tasks(500, 0.5), ("a", "b"), mix={"a": 1.0, "b": 1.0})
    cursor = next(a_plan.steps(a_plan.start())).after
    assert Cursor.from_json(json.loads(json.dumps(cursor.to_json()))) == cursor


def test_cursor_stays_small() -> None:
    steps = epoch(plan(lengths(5000)))
    assert max(len(json.dumps(step.after.to_json())) for step in steps) < 150


@pytest.mark.parametrize("value", [{}, {"plan": "x"}, {"plan": 1, "streams": [[1]]}])
def test_unreadable_cursor_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(UserError, match="cursor"):
        Cursor.from_json(value)


def test_cursor_of_another_plan_is_refused_at_once() -> None:
    tokens = lengths(500)
    with pytest.raises(UserError, match="another plan"):
        plan(tokens).steps(plan(tokens, seed=1).start())


def test_damaged_cursor_is_refused() -> None:
    a_plan = plan(lengths(500))
    for at in ((0, 99, 0), (0, 0, 999)):
        with pytest.raises(UserError, match="damaged"):
            a_plan.steps(Cursor(a_plan.hash, 0, 5, (at,)))


@pytest.mark.parametrize(
    "change",
    [
        {"index": "other"},
        {"seed": 1},
        {"lanes": 5},
        {"tokens_per_batch": 999},
        {"mode": "padded"},
        {"order": "sequential"},
        {"window": 255},
        {"mix": {"asr": 1.0}},
        {"weights": (2.0,)},
    ],
)
def test_hash_changes_with_everything_a_plan_depends_on(change: dict[str, object]) -> None:
    tokens = lengths(100)
    assert plan(tokens).hash == plan(tokens).hash
    assert plan(tokens, **change).hash != plan(tokens).hash


def test_what_a_plan_depends_on_can_be_written_down() -> None:
    settings = plan(lengths(100), mix={"asr": 1.0}, weights=(2.0,), seed=5).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings == {
        "algorithm": 3,
        "weights": [2.0],
        "seed": 5,
        "lanes": 4,
        "tokens_per_batch": 1000,
        "mode": "packed",
        "order": "shuffled",
        "mix": {"asr": 1.0},
        "window": 256,
    }


def test_going_on_from_late_in_an_epoch_plans_nothing_before_it() -> None:
    a_plan = plan(lengths(200_000), window=2048)
    late = Cursor(a_plan.hash, 0, 10_000, ((0, 96, 0),))
    seconds = []
    for cursor in (a_plan.start(), late):
        start = time.process_time()
        next(a_plan.steps(cursor))
        seconds.append(time.process_time() - start)
    # An epoch takes 100 windows: planning it would be far outside this.
    assert seconds[1] < 10 * seconds[0]
