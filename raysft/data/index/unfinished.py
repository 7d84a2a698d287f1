"""Parts that are not whole yet: what was measured of a file is kept while the rest is.

Beside build.py, in the index's folder, where a build that was killed finds it:

    parts/<key>.<...>.unfinished  as the part of that key, of some chunks of its file; cleared away
                                  once the part is there

Written every few seconds, never rewritten. Several builds at once have their own; of a
file that has changed meanwhile those chunks are taken that are still in it (chunks.py).
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path

from raysft import patience
from raysft.data.index.part import Part, load_part, save_part

EVERY_S = 10.0
_DAY_S = 86_400


class Unfinished:
    """Of the parts in an index's folder: those that are there, and those of this build."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "parts"
        self._there: dict[str, list[Path]] = {}
        for name in patience.known(self._names, self._folder):
            self._there.setdefault(name.partition(".")[0], []).append(self._folder / name)
        self._waiting: list[Part] = []
        self._written = time.monotonic()

    def _names(self) -> list[str]:
        try:
            names = os.listdir(self._folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        for path in [self._folder / name for name in names if name.startswith(".")]:
            with contextlib.suppress(OSError):  # half written by a build that was killed
                if time.time() - path.stat().st_mtime > _DAY_S:
                    path.unlink()
        return sorted(name for name in names if name.endswith(".unfinished"))

    def of(self, place: Path) -> list[Part]:
        """Those of the part at `place` that builds before this one have left."""
        found = [load_part(path) for path in self._there.get(place.stem, [])]
        return [part for part in found if part is not None]

    def add(self, place: Path, part: Part) -> None:
        """Some chunks of the part at `place`, just measured: to be kept in a while."""
        self._waiting += [part] if part.chunks else []
        if self._waiting and time.monotonic() - self._written >= EVERY_S:
            path = self._folder / f"{place.stem}.{uuid.uuid4().hex}.unfinished"
            save_part(path, Part.join(self._waiting))
            self._there.setdefault(place.stem, []).append(path)
            self._waiting, self._written = [], time.monotonic()

    def clear(self, place: Path) -> None:
        """The part at `place` is whole: there is no need of them, nor has a build beside this one
        that is at work on it."""
        self._waiting = []
        for path in self._there.pop(place.stem, []):
            with contextlib.suppress(FileNotFoundError):  # by another build
                os.unlink(path)
