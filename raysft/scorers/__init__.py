"""Scorers: a row for each kind of measurement of an evaluation. Whoever names, prints, draws or
compares figures asks the rows.

A new one is one new module here with a `SCORER` (see base.Scorer), or a row given to `register`.
Nothing here imports torch; jiwer and sacrebleu are loaded where texts are scored.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence

from raysft.errors import UserError
from raysft.scorers.base import SPEAKING, Answer, Figure, Loss, Scorer, Spoken, Sums, added

__all__ = [
    "SPEAKING",
    "Answer",
    "Figure",
    "Loss",
    "Scorer",
    "Spoken",
    "Sums",
    "added",
    "by_task",
    "figure_of",
    "figures_of",
    "of_losses",
    "register",
    "scorers",
    "text_figures",
]

_ROWS: dict[str, Scorer] = {}


def register(scorer: Scorer) -> None:
    """Add a row to the table, in every process that starts a run, evaluates or shows figures.

    Raises UserError for a name, of a scorer or of a figure, that another row has.
    """
    if _ROWS.get(scorer.name) is scorer:
        return
    if scorer.name in _ROWS:
        raise UserError(f"there is a scorer {scorer.name} already: give this one another name")
    taken = {figure.name: row.name for row in scorers() for figure in row.figures}
    for figure in scorer.figures:
        if figure.name in taken:
            raise UserError(
                f"{scorer.name}: there is a figure {figure.name} already, of {taken[figure.name]}: "
                "give this one another name"
            )
    _ROWS[scorer.name] = scorer


def scorers() -> tuple[Scorer, ...]:
    """All rows, in the order in which they came."""
    return tuple(_ROWS.values())


def figure_of(metric: str) -> Figure:
    """The row of a metric such as wer/dev; one that no scorer here gives is a plain number."""
    name = metric.partition("/")[0]
    rows = (figure for scorer in scorers() for figure in scorer.figures)
    return next((figure for figure in rows if figure.name == name), Figure(name))


def of_losses(metric: str) -> bool:
    """Whether a metric is of a task's losses, and no text is compared; else it is of a source."""
    name = metric.partition("/")[0]
    rows = (scorer for scorer in scorers() if scorer.wants == "losses")
    return any(figure.name == name for scorer in rows for figure in scorer.figures)


def text_figures() -> list[str]:
    """Names of the figures of texts, which `evaluate.metrics` takes."""
    return [figure.name for row in scorers() if row.wants == "text" for figure in row.figures]


def figures_of(task: str, metrics: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the figures of texts that a task's answers are measured by; none: examples of it are
    not answered.

    metrics: `evaluate.metrics`; of a task that it does not name the rows decide (`Scorer.tasks`).
    """
    if task in metrics:
        return list(metrics[task])
    rows = (row for row in scorers() if row.wants == "text" and task in row.tasks)
    return [figure.name for row in rows for figure in row.figures]


def by_task() -> str:
    """What `figures_of` gives where `evaluate.metrics` is empty, in words."""
    tasks: dict[tuple[str, ...], list[str]] = {}
    for task in dict.fromkeys(t for row in scorers() if row.wants == "text" for t in row.tasks):
        tasks.setdefault(tuple(figures_of(task, {})), []).append(task)
    said = [f"{', '.join(names)}: {', '.join(found)}" for found, names in tasks.items()]
    return "; ".join(said)


for _info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
    _module = importlib.import_module(f"{__name__}.{_info.name}")
    if hasattr(_module, "SCORER"):
        register(_module.SCORER)
