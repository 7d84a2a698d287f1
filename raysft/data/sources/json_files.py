"""Items that are objects of a JSON file: a list, {"data": [...]}, one of them, or one a line."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from raysft import stores
from raysft.data.sources import json_items, json_lines
from raysft.data.sources.base import Chunk, Format, Item, Split, Survey
from raysft.errors import UserError
from raysft.json_types import JsonObject


class JsonFiles(Format):
    """What formats of such files have in common: a source is one file."""

    noun = "item"

    def files(self, path: Path, split: Split) -> list[Path]:
        """The file itself."""
        return [path]

    def survey(self, file: Path) -> Survey:
        """Hash and chunks, cut between items."""
        return (json_lines if _is_lines(file) else json_items).survey(file)

    def items(self, file: Path, chunk: Chunk | None = None) -> Iterator[Item]:
        """The items of the list, the one object, or the lines."""
        return (json_lines if _is_lines(file) else json_items).items(file, chunk)


def first_records(file: Path) -> Iterator[JsonObject]:
    """The objects among a file's first lines, or the first item of its list."""
    if _is_lines(file):
        yield from json_lines.first_objects(file)
        return
    try:
        for item in islice(json_items.items(file), 1):
            record = json.loads(item.raw or b"")
            if isinstance(record, dict):
                yield record
    except (UserError, ValueError, RecursionError):  # broken: said where it is read
        return


def _is_lines(file: Path) -> bool:
    """Whether a file is a record a line."""
    return _are_lines(file, *stores.state(file))


@functools.lru_cache(maxsize=256)  # asked for every chunk, and a first line may be long
def _are_lines(file: Path, _size: int, _time: int) -> bool:
    """A first line that is broken (but no beginning of a document, which goes on after `{`, `[`,
    `,` or `:`) costs that line, not the others."""
    lines = [line.strip() for line in json_lines.first_lines(file)[:2]]
    if not lines or lines[0].startswith(b"["):
        return False
    first, *rest = (line.rstrip(b",") for line in lines)
    if first.startswith(b"{") and first.endswith(b"}") and first != b"{}":
        return bool(rest) or lines[0].endswith(b",")
    closed = bool(rest) and rest[0].startswith(b"{") and rest[0].endswith(b"}")
    return closed and not lines[0].endswith((b"{", b"[", b",", b":"))
