"""What a folder seems to hold, by a few of its files: so are corpora of a million recognised.

All that ask share one look (`stores.recall`), however many formats there are.
"""

from __future__ import annotations

from pathlib import Path

from raysft import stores

_LEVELS, _FOLDERS, _ENTRIES = 4, 8, 1000


def some_files(folder: Path) -> list[Path]:
    """Files in it and below it, `_LEVELS` folders deep: of the first `_FOLDERS` folders of each
    depth, `_ENTRIES` entries each. Raises OSError."""
    return stores.recall(("some files", str(folder)), lambda: _some(folder))


def _some(folder: Path) -> list[Path]:
    found: list[Path] = []
    front = [folder]
    for _ in range(1 + _LEVELS):
        entries = [entry for one in front for entry in stores.entries(one, _ENTRIES)]
        found += [path for path, is_folder in entries if not is_folder]
        front = [path for path, is_folder in entries if is_folder][:_FOLDERS]
    return found
