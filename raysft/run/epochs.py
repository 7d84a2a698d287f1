"""epochs.json: what the epochs of a run's plans came to, so that they are counted once.

In a run's folder. How many steps an epoch has is known when it is planned: a second a million
examples, for each epoch, at each start. A plan is a pure function of what its hash names, so what
it came to once holds for good: of an epoch that took long to count is kept what it came to, by
where it began.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from raysft import patience
from raysft.data.plan.plan import Cursor, Summary
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.run.ownership import ANYONE, Permit
from raysft.run.storage import write_whole

log = logging.getLogger(__name__)

NAME = "epochs.json"
LONG_S = 1.0  # what is counted faster is counted again


class Kept:
    """What is known of the epochs of the run in `folder`."""

    def __init__(self, folder: Path, permit: Permit = ANYONE) -> None:
        """permit: asked before anything is written."""
        self._path, self._permit = folder / NAME, permit
        self._known = self._read()

    def get(self, start: Cursor) -> tuple[Summary, Cursor] | None:
        """What the epoch that begins at `start` came to, and where the next one begins; None: it is
        not known."""
        found = self._known.get(_key(start))
        if found is None:
            return None
        return Summary(**found["summary"]), Cursor.from_json(found["after"])

    def put(self, start: Cursor, total: Summary, after: Cursor, seconds: float) -> None:
        """Keep it, where it took long. Raises UserError where it cannot be written."""
        if seconds < LONG_S:
            return
        self._known[_key(start)] = {"summary": asdict(total), "after": after.to_json()}
        self._permit.require()
        content = json.dumps(self._known, indent=1).encode()
        try:
            patience.patiently(lambda: write_whole(self._path, content), self._path)
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written: {error.strerror or error}"
            ) from error

    def _read(self) -> JsonObject:
        path = self._path

        def read() -> bytes:
            return path.read_bytes() if path.is_file() else b"{}"

        try:
            found = json.loads(patience.patiently(read, path))
            for item in found.values():
                Summary(**item["summary"]), Cursor.from_json(item["after"])
        except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            log.warning("%s: is damaged (%s): epochs are counted again", path, error)
            return {}
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        return found


def _key(start: Cursor) -> str:
    """All that an epoch follows from."""
    return json.dumps(start.to_json(), sort_keys=True)
