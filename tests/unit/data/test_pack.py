"""pack: what goes into one row or batch, checked against definitions written out here."""

from __future__ import annotations

import time

import numpy as np
import pytest

from raysft.data.plan import pack


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def log_normal(n: int, seed: int = 0) -> np.ndarray:
    """Lengths in hundredths of a second, like those of speech corpora."""
    draws = np.random.default_rng(seed).lognormal(1.6, 0.7, n)
    return (np.clip(draws, 0.3, 35) * 100).astype(np.int32)


def plain_best_fit_decreasing(lengths: list[int], budget: int) -> int:
    """The number of rows by the textbook's rule, the slow way."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(budget - length)
    return len(free)


def lists(parts: list[np.ndarray]) -> list[list[int]]:
    return [part.tolist() for part in parts]


def test_packed_rows_hold_every_example_once_within_the_budget() -> None:
    lengths = log_normal(2048)
    rows = pack.packed(lengths, 6000)
    assert sorted(np.concatenate(rows).tolist()) == list(range(2048))
    assert max(lengths[row].sum() for row in rows) <= 6000


@pytest.mark.parametrize("budget", [3500, 4000, 8000, 60000])
def test_packed_needs_no_more_rows_than_best_fit_decreasing_but_for_half_a_percent(
    budget: int,
) -> None:
    for seed in range(5):
        lengths = log_normal(500, seed)
        rows = pack.packed(lengths, budget)
        assert len(rows) <= 1.005 * plain_best_fit_decreasing(lengths.tolist(), budget)


def test_packed_falls_back_to_best_fit_where_even_rows_do_not_do() -> None:
    # Even filling puts 2 and 2 on top of 3 and 3; the last 2 fits nowhere.
    assert lists(pack.packed(ints(2, 3, 2, 3, 2), 6)) == [[1, 3], [0, 2, 4]]


def test_packed_rows_cost_the_same_also_by_the_square_of_lengths() -> None:
    lengths = log_normal(2048).astype(np.int64)
    rows = pack.packed(lengths, int(lengths.sum() // 20))
    squares = [int((lengths[row] ** 2).sum()) for row in rows]
    assert max(squares) < 1.25 * np.mean(squares)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("budget", "most"), [(2000, 1.45), (4000, 1.27), (15_000, 1.1)])
def test_long_examples_are_dealt_evenly_for_at_most_half_a_percent_more_rows(
    budget: int, most: float, noisy: bool
) -> None:
    """Behind a prompt of 20 positions nothing is short enough to fill rows to the last 0.2%."""
    worst, rows_used, best_fit = [], 0, 0
    for seed in range(4):
        lengths = log_normal(4096, seed) // 4 + 20
        whole = int(lengths.sum()) // int(0.998 * budget) * int(0.998 * budget)
        lengths = lengths[pack.choose(lengths, whole)]
        rng = np.random.default_rng(seed)
        rows = pack.packed(
            lengths, budget, rng.integers(0, 1 << 16, len(lengths)) if noisy else None
        )
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
        squares = np.array([float((lengths[row].astype(float) ** 2).sum()) for row in rows])
        steps = rng.permutation(squares)[: len(squares) // 8 * 8].reshape(-1, 8)
        worst.append((steps.max(axis=1) / steps.mean(axis=1)).mean())
        rows_used += len(rows)
        best_fit += plain_best_fit_decreasing(lengths.tolist(), budget)
    assert np.mean(worst) < most
    assert rows_used <= 1.005 * best_fit


def test_rows_too_short_for_even_dealing_are_filled_no_worse_than_by_best_fit() -> None:
    lengths = log_normal(2000) // 40 + 43
    noise = np.random.default_rng(0).integers(0, 1 << 16, len(lengths))
    for budget in (140, 200, 300):
        fitting = lengths[lengths <= budget]
        rows = pack.packed(fitting, budget, noise[: len(fitting)])
        assert max(fitting[row].sum() for row in rows) <= budget
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(fitting)))
        assert len(rows) <= 1.005 * plain_best_fit_decreasing(fitting.tolist(), budget)


def test_padded_batches_that_are_shaken_stay_within_the_budget_and_pad_little_more() -> None:
    lengths = log_normal(4096)
    computed = []
    for noise in (None, np.random.default_rng(0).integers(0, 1 << 16, len(lengths))):
        batches = pack.padded(lengths, 60_000, noise)
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        sizes = [len(batch) * int(lengths[batch].max()) for batch in batches]
        assert max(sizes) <= 60_000
        computed.append(sum(sizes))
    assert computed[1] < 1.006 * computed[0]


def test_packed_of_nothing_is_nothing() -> None:
    assert pack.packed(ints(), 10) == []
    assert pack.padded(ints(), 10) == []
    assert pack.in_order(ints(), 10, pad=False) == []


def test_packed_of_examples_as_long_as_the_budget_gives_each_its_row() -> None:
    assert sorted(lists(pack.packed(ints(10, 10, 10), 10))) == [[0], [1], [2]]


def test_padded_batches_count_every_example_as_long_as_the_longest() -> None:
    lengths = log_normal(2048)
    batches = pack.padded(lengths, 6000)
    assert sorted(np.concatenate(batches).tolist()) == list(range(2048))
    assert max(len(batch) * lengths[batch].max() for batch in batches) <= 6000


def test_padded_batches_join_similar_lengths_and_leave_the_remainder_to_short_ones() -> None:
    assert lists(pack.padded(ints(1, 5, 2, 4, 5, 1, 2), 10)) == [[1, 4], [3, 2], [6, 0, 5]]
    lengths = ints(9, 1, 9, 1, 9, 1)
    assert lists(pack.padded(lengths, 18)) == [[0, 2], [4, 1], [3, 5]]


def test_in_order_closes_a_row_when_the_next_example_does_not_fit() -> None:
    lengths = ints(4, 4, 4, 1, 9, 2)
    assert lists(pack.in_order(lengths, 10, pad=False)) == [[0, 1], [2, 3], [4], [5]]


def test_in_order_counts_padding_where_it_is_computed() -> None:
    # 1 + 6 fits a row of 10; padded it is 2 x 6.
    assert lists(pack.in_order(ints(1, 6), 10, pad=False)) == [[0, 1]]
    assert lists(pack.in_order(ints(1, 6), 10, pad=True)) == [[0], [1]]
    assert lists(pack.in_order(ints(3, 2, 3, 1), 9, pad=True)) == [[0, 1, 2], [3]]


def test_choose_reaches_the_amount_as_closely_as_one_example_can() -> None:
    lengths = ints(4, 4, 9, 3, 2)
    chosen = pack.choose(lengths, 10)
    assert lengths[chosen].sum() == 10
    assert pack.choose(lengths, 0).sum() == 0
    assert pack.choose(lengths, 100).all()
    big = log_normal(2048)
    for amount in (1, 777, 12_345, 100_000):
        assert 0 <= big[pack.choose(big, amount)].sum() - amount < 50


def test_packing_takes_as_long_for_each_of_many_examples_as_of_few() -> None:
    """n log n: on any processor one window of 32,768 is about as much work as 16 of 2,048."""

    def seconds(windows: list[np.ndarray]) -> float:
        start = time.process_time()
        for lengths in windows:
            pack.packed(lengths, 60_000)
        return time.process_time() - start

    few = [log_normal(2048, seed) for seed in range(16)]
    many = [np.concatenate(few)]
    assert min(seconds(many) for _ in range(2)) < 5 * min(seconds(few) for _ in range(2))
