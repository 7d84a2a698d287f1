"""The names that `train.grpo.rewards` takes, as data: what an answer earns.

Nothing here imports torch; `load` gets the function of a name where it is used.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from raysft.errors import UserError


@dataclass(frozen=True)
class Reward:
    """What an answer earns.

    function: "module:name" of a function (answer: str, facts: raysft.data.facts.Facts) -> float.
    about: one line for people.
    """

    name: str
    function: str
    about: str = ""


_ROWS: dict[str, Reward] = {}


def register(row: Reward) -> None:
    """Add a row to the table, in every process that reads the config or trains. Raises UserError
    for a name that another row has."""
    if _ROWS.get(row.name) is row:
        return
    if row.name in _ROWS:
        raise UserError(f"there is a reward {row.name} already: give this one another name")
    _ROWS[row.name] = row


def choices() -> list[str]:
    """What `train.grpo.rewards` takes as names."""
    return list(_ROWS)


def about(name: str) -> str:
    """One line about a row."""
    return _ROWS[name].about


def load(name: str) -> Callable[..., float]:
    """The function of a row: (answer, facts) -> float."""
    found: Callable[..., float] = pkgutil.resolve_name(_ROWS[name].function)
    return found


for _row in (
    Reward(
        "accuracy",
        "raysft.objectives.rewards:accuracy",
        "1 where what stands in <answer> is what stands there in the right answer, as a number or "
        "a text; without tags the whole answers are compared",
    ),
    Reward(
        "format",
        "raysft.objectives.rewards:form",
        "1 where the answer is <answer>...</answer> and nothing else",
    ),
    Reward(
        "rating",
        "raysft.objectives.rewards:rating",
        "how far the first whole number in <answer> is from the raters' mean, negative; without "
        "one, as far as the scale is long; of [Name]4[Other]3 the mean over the "
        "dimensions asked about",
    ),
):
    register(_row)
