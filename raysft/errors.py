"""The one exception a user is meant to see.

Everything a user can cause (a wrong key, a missing file, a run folder of another config) is
raised as `UserError`: one readable line naming what was found, what was expected and the remedy.
The jobs print that line and exit with a non-zero code; any other exception is our defect and
keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend. The message is one readable line (or a short list of lines)."""


class BadExample(Exception):
    """An example that cannot be used. It is quarantined with this message as the reason."""
