"""plan: what holds for every index, every config and every point of a run.

Each example here simulates runs of several epochs; hypothesis draws the index and the config.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raysft.config.schema import Data
from raysft.data.plan.plan import ALGORITHM, Cursor, Plan, PlannedStep

BUDGETS = st.integers(4, 60)
MANY = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class World:
    """An index and a config, and the steps of a run on them."""

    tokens: np.ndarray
    task: np.ndarray
    source: np.ndarray
    weights: list[float]
    data: Data
    seed: int
    algorithm: int = ALGORITHM

    def plan(self) -> Plan:
        tasks = ["asr", "tts", "edit"]
        return Plan(
            self.tokens,
            self.task,
            tasks,
            self.source,
            self.weights,
            "index",
            self.data,
            self.seed,
            self.algorithm,
        )

    def run(self, count: int) -> list[PlannedStep]:
        plan = self.plan()
        return list(itertools.islice(plan.steps(plan.start()), count))


@st.composite
def worlds(
    draw: st.DrawFn, mixed: bool | None = None, weighted: bool = False, order: str | None = None
) -> World:
    n, budget = draw(st.integers(1, 200)), draw(BUDGETS)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Lengths of all shapes: few values, many, some beyond the budget.
    tokens = rng.integers(1, draw(st.integers(2, 2 * budget)), n).astype(np.int32)
    tasks = draw(st.integers(1, 3))
    task = rng.integers(0, tasks, n).astype(np.int16)
    tokens[0] = min(tokens[0], budget)
    mix: dict[str, float] = {}
    if mixed if mixed is not None else draw(st.booleans()):
        # Every task occurs with at least one example that fits.
        extra = np.arange(tasks, dtype=np.int16)
        task, tokens = np.concatenate([task, extra]), np.concatenate([tokens, [1] * tasks])
        mix = {name: draw(st.floats(0.1, 1)) for name in ("asr", "tts", "edit")[:tasks]}
    least = math.ceil(sum(mix.values()) / min(mix.values())) if mix else 1
    source = np.sort(rng.integers(0, 3, len(tokens))).astype(np.int16)
    return World(
        tokens=tokens.astype(np.int32),
        task=task,
        source=source,
        weights=[draw(st.floats(0.1, 3)) if weighted else 1.0 for _ in range(3)],
        data=Data(
            lanes=least + draw(st.integers(0, 6)),
            tokens_per_batch=budget,
            mode=draw(st.sampled_from(["packed", "padded"])),
            order=order or draw(st.sampled_from(["shuffled", "sequential"])),
            window=draw(st.integers(1, 100)),
            mix=mix,
        ),
        seed=draw(st.integers(0, 2**40)),
        algorithm=draw(st.sampled_from([ALGORITHM, ALGORITHM, 1])),
    )


def rows(steps: list[PlannedStep]) -> list[int]:
    return [int(row) for step in steps for lane in step.lanes for row in lane]


def shown(steps: list[PlannedStep]) -> list[tuple[int, int, list[list[int]], Cursor]]:
    return [(s.epoch, s.step, [lane.tolist() for lane in s.lanes], s.after) for s in steps]


def fitting(world: World) -> list[int]:
    return np.flatnonzero(world.tokens <= world.data.tokens_per_batch).tolist()


@MANY
@given(worlds(mixed=False))
def test_every_epoch_has_every_example_that_fits_exactly_once(world: World) -> None:
    plan = world.plan()
    total = sum(plan.count_steps(epoch) for epoch in range(3))
    steps = world.run(total)
    for epoch in range(3):
        of_epoch = [step for step in steps if step.epoch == epoch]
        assert sorted(rows(of_epoch)) == fitting(world)
    assert steps[-1].after.epoch == 3
    assert sorted([*fitting(world), *plan.oversize.tolist()]) == list(range(len(world.tokens)))


@MANY
@given(worlds(weighted=True))
def test_no_micro_batch_exceeds_the_budget_and_every_step_has_all_lanes(world: World) -> None:
    data = world.data
    for step in world.run(20):
        assert len(step.lanes) == data.lanes
        assert any(len(lane) for lane in step.lanes)
        for lane in filter(len, step.lanes):
            lengths = world.tokens[lane].astype(int)
            used = lengths.sum() if data.mode == "packed" else len(lane) * lengths.max()
            assert used <= data.tokens_per_batch


@MANY
@given(worlds(weighted=True), st.integers(0, 11))
def test_going_on_from_any_cursor_gives_the_same_steps(world: World, done: int) -> None:
    whole = world.run(12)
    plan = world.plan()
    cursor = plan.start() if done == 0 else whole[done - 1].after
    cursor = Cursor.from_json(cursor.to_json())
    rest = list(itertools.islice(plan.steps(cursor), 12 - done))
    assert shown(rest) == shown(whole[done:])


@MANY
@given(worlds(weighted=True))
def test_a_cursor_tells_whether_its_epoch_has_begun(world: World) -> None:
    plan = world.plan()
    assert plan.begins(plan.start())
    for step in world.run(15):
        assert plan.begins(step.after) == (step.after.epoch > step.epoch)


@MANY
@given(worlds(mixed=False), st.integers(1, 3), st.integers(0, 50))
def test_an_epoch_can_be_begun_without_those_before_it(world: World, epoch: int, done: int) -> None:
    plan = world.plan()
    start = plan.start(epoch, done)
    assert plan.begins(start)
    steps = list(itertools.takewhile(lambda step: step.epoch == epoch, plan.steps(start)))
    assert [step.step for step in steps] == list(range(done + 1, done + 1 + len(steps)))
    assert sorted(rows(steps)) == fitting(world)


@MANY
@given(worlds(mixed=False, order="sequential"))
def test_sequential_order_is_kept(world: World) -> None:
    steps = world.run(world.plan().count_steps(0))
    assert rows(steps) == fitting(world)
    # and lanes fill from the first: only the last may be empty
    sizes = [len(lane) for step in steps for lane in step.lanes]
    assert all(sizes[: len(sizes) - world.data.lanes])


@MANY
@given(worlds(mixed=True))
def test_mix_holds_in_every_step_and_on_average(world: World) -> None:
    mix, lanes = world.data.mix, world.data.lanes
    shares = np.array([mix.get(name, 0) for name in ("asr", "tts", "edit")]) / sum(mix.values())
    total = np.zeros(3)
    steps = world.run(40)
    for step in steps:
        assert all(len(lane) for lane in step.lanes)
        of_lanes = [set(world.task[lane].tolist()) for lane in step.lanes]
        assert all(len(tasks) == 1 for tasks in of_lanes)
        count = np.bincount([tasks.pop() for tasks in of_lanes], minlength=3)
        assert np.all(np.abs(count - shares * lanes) < 1)
        total += count
    assert np.all(np.abs(total - shares * lanes * len(steps)) < 4)


@MANY
@given(worlds(mixed=True))
def test_mixed_epochs_show_every_example_once_more_at_least(world: World) -> None:
    plan = world.plan()
    seen: Counter[int] = Counter()
    steps = world.run(plan.count_steps(0) + plan.count_steps(1))
    for epoch in range(2):
        seen.update(rows([step for step in steps if step.epoch == epoch]))
        assert all(seen[row] > epoch for row in fitting(world))
    # Within a task all examples have been seen equally often, but for the cycle under way.
    for task in range(3):
        times = [seen[row] for row in fitting(world) if world.task[row] == task]
        assert not times or max(times) - min(times) <= 1


@MANY
@given(worlds(mixed=False, weighted=True))
def test_over_many_epochs_every_example_is_seen_as_its_source_is_weighted(world: World) -> None:
    plan, epochs = world.plan(), 5
    seen = Counter(rows(world.run(sum(plan.count_steps(epoch) for epoch in range(epochs)))))
    for row in fitting(world):
        # A fraction walks through the source's blocks: after any number of epochs, every one has
        # had its share, rounded down or up.
        assert abs(seen[row] - epochs * world.weights[world.source[row]]) < 1 + 1e-6


@MANY
@given(worlds(weighted=True))
def test_the_same_config_and_seed_give_the_same_plan(world: World) -> None:
    assert world.plan().hash == world.plan().hash
    assert shown(world.run(6)) == shown(world.run(6))


@MANY
@given(worlds(order="shuffled"), st.integers(1, 5))
def test_another_seed_is_another_plan(world: World, change: int) -> None:
    other = World(**{**vars(world), "seed": world.seed + change})
    assert world.plan().hash != other.plan().hash
    if len(set(fitting(world))) > 60:
        assert shown(world.run(5)) != shown(other.run(5))


@MANY
@given(worlds(mixed=False, order="shuffled"))
def test_epochs_are_shuffled_differently(world: World) -> None:
    plan = world.plan()
    first = plan.count_steps(0)
    steps = world.run(first + plan.count_steps(1))
    if len(fitting(world)) > 60:
        lanes = [[lane.tolist() for lane in step.lanes] for step in steps]
        assert lanes[:first] != lanes[first:]
