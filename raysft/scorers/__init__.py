"""Scorers: a row for each kind of measurement of an evaluation. Whoever names, prints, draws or
compares figures asks the rows.

A new one is one new module here with a `SCORER` (see base.Scorer), or a row given to `register`.
Nothing here imports torch; jiwer is loaded where texts are scored.
"""

from __future__ import annotations

import importlib
import pkgutil

from raysft.errors import UserError
from raysft.scorers.base import Answer, Figure, Loss, Scorer, Sums, added

__all__ = [
    "Answer",
    "Figure",
    "Loss",
    "Scorer",
    "Sums",
    "added",
    "answered_tasks",
    "figure_of",
    "of_losses",
    "register",
    "scorers",
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


def answered_tasks() -> set[str]:
    """Tasks whose examples the model answers, for a scorer compares the texts."""
    return {task for scorer in scorers() if scorer.wants == "text" for task in scorer.tasks}


for _info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
    _module = importlib.import_module(f"{__name__}.{_info.name}")
    if hasattr(_module, "SCORER"):
        register(_module.SCORER)
