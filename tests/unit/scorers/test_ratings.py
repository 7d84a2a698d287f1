"""Ratings against raters: what an answer says, figures against scipy and a table worked by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from raysft.config.schema import Evaluate
from raysft.evaluate.run import measured
from raysft.scorers import Answer, added, agreement
from raysft.scorers.base import Loss
from raysft.scorers.rated import Rated
from raysft.scorers.rating_tokens import SCORER as TOKENS
from raysft.scorers.ratings import SCORER, model_score


def rated(*ratings: int, number: int = 0, label: str = "", high: int = 5) -> Rated:
    low = 0 if high == 1 else 1
    return Rated(f"r{number}", "role", "pitch_dynamics", "pitch", ratings, low, high, label)


def answer(one: Rated, text: str, chance: float | None = None) -> Answer:
    return Answer(one.original, "dev", "rating", None, "", text, (one,), (chance,))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>4</answer>", 4),
        ("<answer> 4 </answer>", 4),
        ("<think>3 of 5</think><answer>The rating is 2.</answer>", 2),
        ("<answer>4.5</answer>", 4),
        ("<answer>N/A</answer>", None),
        ("<answer></answer>", None),
        ("4", None),
        ("<answer>4", None),
        ("<answer>7</answer>", None),
        ("<answer>0</answer>", None),
        ("<answer>45</answer>", None),
        ("", None),
    ],
)
def test_the_score_is_the_first_whole_number_inside_the_tags(
    text: str, expected: int | None
) -> None:
    assert model_score(text, rated(3)) == expected


def test_of_several_dimensions_each_has_its_own_number() -> None:
    text = "<answer>[PitchDynamics]4[Stress]N/A[Rhythm]2</answer>"
    found = [model_score(text, rated(3, label=x)) for x in ("PitchDynamics", "Stress", "Rhythm")]
    assert found == [4, None, 2]
    assert model_score(text, rated(3, label="Other")) is None
    assert model_score("<answer>1</answer>", rated(1, 1, high=1)) == 1


def test_figures_are_those_of_a_table_worked_by_hand() -> None:
    # truths 1, 2, 3, 4 (means of two raters); answers 1, 3, 3, none; probabilities 1.5, 2, 3, 4
    table = [((1, 1), "1", 1.5), ((1, 3), "3", 2.0), ((3, 3), "3", 3.0), ((4, 4), "no", 4.0)]
    answers = [
        answer(rated(*ratings, number=n), f"<answer>{text}</answer>", chance)
        for n, (ratings, text, chance) in enumerate(table)
    ]
    found = measured(answers, Evaluate())
    expected = {
        "missing_scores": 0.25,
        "mae": 1 / 3,
        "mse": 1 / 3,
        "rmse": math.sqrt(1 / 3),
        "r2": 1 - 1 / 2,
        "pearson": 2 / math.sqrt(2 * 8 / 3),
        "spearman": 1.5 / math.sqrt(2 * 1.5),
        "probability_mae": 0.125,
        "probability_mse": 0.0625,
        "probability_rmse": 0.25,
        "probability_r2": 1 - 0.25 / 5,
        "probability_spearman": 1.0,
        # Within recordings (1, 3) differ alone: 2 * 4 / 1 = 8. Of all eight ratings the squared
        # differences of ordered pairs add up to 2 * 8 * (sum of squares about 2.5 = 12) = 192.
        "rater_alpha": 1 - 8 / (192 / 7),
    }
    for name, value in expected.items():
        assert found[f"{name}/dev"] == pytest.approx(value, abs=1e-12), name


def test_figures_and_p_values_are_scipys() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(2, 11, 60) / 2
    scores = np.clip(np.rint(truth + rng.normal(0, 1, 60)), 1, 5)
    found = agreement.figures(truth.tolist(), scores.tolist())
    pearson, spearman = stats.pearsonr(truth, scores), stats.spearmanr(truth, scores)
    assert (found["pearson"], found["pearson_p"]) == pytest.approx(tuple(pearson), rel=1e-12)
    assert (found["spearman"], found["spearman_p"]) == pytest.approx(tuple(spearman), rel=1e-12)
    slope = ((truth - scores) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
    assert found["r2"] == pytest.approx(1 - slope)


def test_what_is_not_defined_is_left_out_and_never_zero() -> None:
    assert agreement.figures([], []) == {}
    constant = agreement.figures([3, 3, 3], [1, 2, 3])
    assert constant.keys() == {"mae", "mse", "rmse"} and constant["mae"] == 1
    same = agreement.figures([1, 2, 3], [2, 2, 2])
    assert same.keys() == {"mae", "mse", "rmse", "r2"}
    missing = measured([answer(rated(3, 4), "no tags")] * 3, Evaluate())
    # Within: 3 * 2 / 1; of all six ratings: 2 * 6 * 1.5 / 5.
    assert missing == {"missing_scores/dev": 1.0, "rater_alpha/dev": pytest.approx(1 - 6 / 3.6)}
    assert measured([Answer("a", "dev", "rating", None, "x", "y")], Evaluate()) == {}


def test_alpha_is_that_of_krippendorffs_example() -> None:
    # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section D: interval 0.849.
    nothing = None
    coders = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, nothing, nothing, nothing],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nothing, 3],
        [nothing, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nothing],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nothing],
    ]
    units = [[row[n] for row in coders if row[n] is not None] for n in range(12)]
    assert agreement.alpha(units) == pytest.approx(0.849, abs=5e-4)
    assert agreement.alpha([[3, 3], [3, 3]]) is None and agreement.alpha([[1], [2]]) is None
    assert agreement.alpha([[1, 1], [4, 4], [2, 2]]) == 1


def test_intervals_are_seeded_and_hold_whole_recordings_together() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=40)
    scores = truth + rng.normal(size=40)
    groups = [f"r{n}" for n in range(40)]
    found = agreement.intervals(truth, scores, groups, seed=3)
    assert found == agreement.intervals(truth, scores, groups, seed=3)
    assert found != agreement.intervals(truth, scores, groups, seed=4)
    value = agreement.figures(truth, scores)
    for name, (low, high) in found.items():
        assert low < value[name] < high
    # scipy's own percentile bootstrap of the same thing
    reference = stats.bootstrap(
        (truth, scores),
        lambda a, b: stats.pearsonr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found["pearson"] == pytest.approx((reference.low, reference.high), abs=0.05)
    # Ten copies of each recording's score say nothing new.
    again = agreement.intervals(np.tile(truth, 10), np.tile(scores, 10), groups * 10, seed=3)
    for name, edges in again.items():
        assert edges == pytest.approx(found[name], abs=1e-9)


def test_figures_do_not_depend_on_who_answered_what() -> None:
    rng = random.Random(0)
    answers = [
        answer(
            rated(rng.randint(1, 5), rng.randint(1, 5), number=n),
            f"<answer>{rng.randint(1, 6)}</answer>",
            rng.uniform(1, 5),
        )
        for n in range(50)
    ]
    whole = SCORER.result(SCORER.count(answers, Evaluate()))
    assert 0 < whole["missing_scores"] < 0.5 and len(whole) == len(SCORER.figures)
    for workers in (2, 3):
        parts = [SCORER.count(answers[n::workers], Evaluate()) for n in range(workers)]
        assert SCORER.result(added(parts[::-1])) == whole  # to the last bit


def test_tokens_are_counted_over_all_batches() -> None:
    def batch(**sums: float) -> list[Loss]:
        return [Loss(value, 10, name, 0.0) for name, value in sums.items()]

    first = batch(cross_entropy=3, token_right=9, score_seen_4=1, score_right_4=1)
    second = batch(cross_entropy=3, token_right=3, score_seen_4=3, score_right_4=0, score_seen_2=0)
    parts = [TOKENS.count(part, Evaluate()) for part in (first, second)]
    found: dict[str, Any] = TOKENS.result(added(parts))
    assert found == {"token_accuracy": 0.6, "accuracy_of_4": 0.25}
