"""How scores agree with raters: errors, correlations, intervals; and how raters agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

DRAWS = 1000  # of a bootstrap
WITHIN = 0.95  # of them lie in the interval
INTERVALS = ("mae", "rmse", "pearson", "spearman")


def figures(truth: Sequence[float], scores: Sequence[float]) -> dict[str, float]:
    """mae, mse, rmse, r2, pearson, spearman and the p-values of these two (two-sided). What is not
    defined is left out: r2 where all truths are one number, correlations where one side is that,
    or of less than 2 (their p-values: of less than 3)."""
    from scipy import stats

    if not len(truth):
        return {}
    wanted, given = np.asarray(truth, float), np.asarray(scores, float)
    errors = given - wanted
    mse = float(np.mean(errors**2))
    found = {"mae": float(np.mean(np.abs(errors))), "mse": mse, "rmse": math.sqrt(mse)}
    spread = float(np.sum((wanted - wanted.mean()) ** 2))
    if np.ptp(wanted) > 0:
        found["r2"] = 1 - float(np.sum(errors**2)) / spread
    if len(wanted) > 1 and np.ptp(wanted) > 0 and np.ptp(given) > 0:
        for name, of in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            value, p = cast(tuple[float, float], of(wanted, given))
            found[name] = float(value)
            if len(wanted) > 2:
                found[f"{name}_p"] = float(p)
    return found


def alpha(units: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's alpha of interval data. units: the ratings of each recording; those with less
    than two say nothing. None: where there is nothing to compare, or all ratings are one number."""
    paired = [np.asarray(unit, float) for unit in units if len(unit) > 1]
    if not paired:
        return None
    every = np.concatenate(paired)
    expected = _pairs(every) / (len(every) - 1)
    if not np.ptp(every):
        return None
    return 1 - sum(_pairs(unit) / (len(unit) - 1) for unit in paired) / expected


def _pairs(values: np.ndarray) -> float:
    """Sum over ordered pairs of their squared differences."""
    centred = values - values.mean()
    return 2 * len(values) * float(np.sum(centred**2))


def intervals(
    truth: Sequence[float],
    scores: Sequence[float],
    groups: Sequence[str],
    seed: int = 0,
    draws: int | None = None,
) -> dict[str, tuple[float, float]]:
    """Of each of INTERVALS the middle 95% of its values over bootstrap samples (percentiles).

    groups: what each score is of; those of one recording are drawn together, for they depend on
    each other. Samples in which a figure is not defined are left out of it.
    """
    wanted, given = np.asarray(truth, float), np.asarray(scores, float)
    by_group: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        by_group.setdefault(group, []).append(place)
    draws = DRAWS if draws is None else draws
    places = [np.array(by_group[group]) for group in sorted(by_group)]
    if len(places) < 2:
        return {}
    rng = np.random.default_rng(seed)
    values: dict[str, list[float]] = {name: [] for name in INTERVALS}
    for _ in range(draws):
        rows = np.concatenate([places[n] for n in rng.integers(len(places), size=len(places))])
        for name, of in _QUICK.items():
            value = of(wanted[rows], given[rows])
            if math.isfinite(value):
                values[name].append(value)
    edges = (50 * (1 - WITHIN), 50 * (1 + WITHIN))
    return {
        name: cast(tuple[float, float], tuple(map(float, np.percentile(found, edges))))
        for name, found in values.items()
        if len(found) > draws // 2
    }


def _pearson(truth: np.ndarray, scores: np.ndarray) -> float:
    if not np.ptp(truth) or not np.ptp(scores):
        return math.nan
    a, b = truth - truth.mean(), scores - scores.mean()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def _spearman(truth: np.ndarray, scores: np.ndarray) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(truth), rankdata(scores))


_QUICK: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mae": lambda truth, scores: float(np.mean(np.abs(scores - truth))),
    "rmse": lambda truth, scores: float(np.sqrt(np.mean((scores - truth) ** 2))),
    "pearson": _pearson,
    "spearman": _spearman,
}
