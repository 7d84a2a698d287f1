"""The one exception a user is meant to see.

Everything a user can cause (a wrong key, a missing file, a run folder of another config) is
raised as `UserError`: one readable line naming what was found, what was expected and the remedy.
The jobs print that line and exit with a non-zero code; any other exception is our defect and
keeps its traceback.
"""

from __future__ import annotations

from typing import NamedTuple


class UserError(Exception):
    """A mistake the user can mend. The message is one readable line (or a short list of lines)."""


class Mistake(NamedTuple):
    """What is wrong with a key. text: the whole line, for people; nothing is read out of it."""

    key: str
    text: str

    @classmethod
    def of(cls, key: str, why: str) -> Mistake:
        """The line of a key and what is wrong with it."""
        return cls(key, f"{key}: {why}")


class BadExample(Exception):
    """An example that cannot be used. It is quarantined with this message as the reason.

    kind: of the reason, one of `data.quarantine.KINDS`; None: its text tells, if anything.
    example: its id, where whoever raises it knows that.
    """

    def __init__(self, text: str, kind: str | None = None, example: str | None = None) -> None:
        super().__init__(text)
        self.kind = kind
        self.example = example


def first_line(error: BaseException) -> str:
    """The first line of a library's message; "" where it has none."""
    return next(iter(str(error).splitlines()), "")
