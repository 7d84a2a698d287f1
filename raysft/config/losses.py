"""The names that `train.losses` takes, as data: losses of single tokens beside the cross-entropy.

Nothing here imports torch; `load` gets the function of a name where it is used.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import Any

from raysft.errors import UserError


@dataclass(frozen=True)
class TokenLoss:
    """A loss of every supervised token, made from its logits.

    function: "module:name" of a function (logits float32 [M, V], targets int64 [M]) -> float32 [M]
    that autograd can differentiate. about: one line for people.
    """

    name: str
    function: str
    about: str = ""


_ROWS: dict[str, TokenLoss] = {}


def register(row: TokenLoss) -> None:
    """Add a row to the table, in every process that reads the config or trains. Raises UserError
    for a name that another row has."""
    if _ROWS.get(row.name) is row:
        return
    if row.name in _ROWS:
        raise UserError(f"there is a loss {row.name} already: give this one another name")
    _ROWS[row.name] = row


def choices() -> list[str]:
    """What `train.losses` takes as names."""
    return list(_ROWS)


def about(name: str) -> str:
    """One line about a row."""
    return _ROWS[name].about


def load(name: str) -> Any:
    """The function of a row. Imports torch."""
    return pkgutil.resolve_name(_ROWS[name].function)


register(TokenLoss("z_loss", "raysft.losses.z_loss:z_loss", "keeps log-partitions near zero"))
