"""Pictures of how models judge: correlations by dimension and model, scores against raters,
calibration, and how often each score is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raysft.errors import UserError
from raysft.run.judged import KINDS, Row, has_results, read, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = ("correlations.png", "scatter.png", "calibration.png", "distribution.png")
Models = Mapping[str, Sequence[Row]]


def named(folders: Sequence[Path]) -> dict[str, Sequence[Row]]:
    """What each folder holds, by a name that is its own. Raises UserError as `read`."""
    found: dict[str, Sequence[Row]] = {}
    for folder in folders:
        parts, depth = folder.absolute().parts, 1
        while (name := "/".join(parts[-depth:])) in found and depth < len(parts):
            depth += 1
        found[name] = read(folder)
    return found


def holds_results_alone(folder: Path) -> bool:
    """Whether a folder is no run's, and result files lie in it or below it."""
    return not (folder / "metrics.jsonl").exists() and has_results(folder)


def draw(folders: Sequence[Path], target: Path | None = None) -> list[Path]:
    """Draw PICTURES of the result files in these folders, a folder a model; returns their paths.

    target: the folder they go to; by default the first one. Raises UserError.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models, place = named(folders), target or folders[0]
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, panel in zip(PICTURES[1:], (_scatter, _calibration, _distribution), strict=True):
            figure, axes = plt.subplots(
                1, len(models), figsize=(4 * len(models), 4), constrained_layout=True, squeeze=False
            )
            for axis, (model, rows) in zip(axes[0], models.items(), strict=True):
                axis.set_title(model, fontsize=9)
                panel(axis, rows)
            figure.savefig(place / name, dpi=110)
            plt.close(figure)
        _correlations(models, place / PICTURES[0])
    except OSError as error:
        raise UserError(f"{place}: cannot be written: {error.strerror or error}") from error
    return [place / name for name in PICTURES]


def table(models: Models) -> tuple[list[str], list[str], np.ndarray]:
    """Names of columns (a model, a kind of score), of rows (dimensions), and Spearman's correlation
    of each [rows, columns]; NaN where it is not defined."""
    columns = [f"{model}\n{kind.removesuffix('_score')}" for model in models for kind in KINDS]
    sums = {
        model: {(s["dimension"], s["score"]): s for s in summary(rows)}
        for model, rows in models.items()
    }
    names = list(dict.fromkeys(dimension for found in sums.values() for dimension, _ in found))
    values = np.full((len(names), len(columns)), np.nan)
    for row, dimension in enumerate(names):
        for column, (model, kind) in enumerate((m, k) for m in models for k in KINDS):
            value = sums[model].get((dimension, kind), {}).get("spearman")
            values[row, column] = np.nan if value is None else value
    return columns, names, values


def _correlations(models: Models, target: Path) -> None:
    import matplotlib.pyplot as plt

    columns, names, values = table(models)
    size = (2.5 + 1.1 * len(columns), 1.5 + 0.4 * len(names))
    figure, axis = plt.subplots(figsize=size, constrained_layout=True)
    image = axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        text = "-" if np.isnan(value) else f"{value:.2f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=8)
    axis.set_title("Spearman's correlation with the raters' mean", fontsize=9)
    figure.colorbar(image, ax=axis)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _pairs(rows: Sequence[Row], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Truths and scores, where there is one."""
    found = [(row.truth, score) for row in rows if (score := row.score(kind)) is not None]
    both = np.array(found, float).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _scatter(axis: Axes, rows: Sequence[Row]) -> None:
    rng = np.random.default_rng(0)
    for kind in KINDS:
        truth, score = _pairs(rows, kind)
        shaken = rng.uniform(-0.1, 0.1, (2, len(truth)))  # whole numbers would hide each other
        axis.plot(truth + shaken[0], score + shaken[1], ".", alpha=0.4, label=kind)
    _diagonal(axis, rows)
    axis.set_xlabel("mean of the raters")
    axis.set_ylabel("score")


def _calibration(axis: Axes, rows: Sequence[Row]) -> None:
    """Of scores that are nearly the same, the raters' mean."""
    for kind in KINDS:
        truth, score = _pairs(rows, kind)
        near = np.rint(2 * score) / 2
        bins = np.unique(near)
        means = [(score[near == one].mean(), truth[near == one].mean()) for one in bins]
        axis.plot(*zip(*means, strict=True) if means else ([], []), "o-", label=kind)
    _diagonal(axis, rows)
    axis.set_xlabel("score, to the half")
    axis.set_ylabel("mean of the raters")


def _diagonal(axis: Axes, rows: Sequence[Row]) -> None:
    truths = [row.truth for row in rows]
    axis.plot([min(truths), max(truths)], [min(truths), max(truths)], "0.6", linestyle=":")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _distribution(axis: Axes, rows: Sequence[Row]) -> None:
    """How often each score is given, by raters and by the model; and how often none."""
    given = [rating for row in rows for rating in row.ratings]
    said = [row.model for row in rows if row.model is not None]
    scores = np.arange(int(min([*given, *said])), int(max([*given, *said])) + 1)
    for shift, (label, values) in ((-0.2, ("raters", given)), (0.2, ("model", said))):
        shares = [values.count(score) / max(1, len(values)) for score in scores.tolist()]
        axis.bar(scores + shift, shares, 0.4, label=label)
    missing = sum(row.model is None for row in rows)
    axis.set_xlabel(f"score ({missing} of {len(rows)} missing)")
    axis.set_ylabel("share")
    axis.legend(fontsize=8)
