"""Lines of text files, as tables of ids and folders of texts have them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from raysft import stores
from raysft.data.sources.base import BOM
from raysft.errors import UserError


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, line without its end) of a file's lines that are not blank.

    Raises UserError naming the first that is no UTF-8; OSError.
    """
    with stores.opened(file) as stream:
        for number, raw in enumerate(stream, 1):
            line = decoded(raw, file, number).rstrip("\r\n")
            if line.strip():
                yield number, line


def decoded(raw: bytes, file: Path, number: int) -> str:
    """Line `number` of a file, from 1, as text. Raises UserError where it is no UTF-8."""
    try:
        return raw.removeprefix(BOM if number == 1 else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}:{number} is not valid UTF-8 ({error.reason} at byte {error.start}): "
            "iconv -f CODE -t UTF-8 FILE > NEW converts it, where CODE is its encoding"
        ) from None


def table(file: Path) -> dict[str, str]:
    """{first word: the rest} of a file's lines. Raises UserError where one has two meanings."""
    found: dict[str, str] = {}
    for number, line in lines(file):
        name, _, value = line.strip().replace("\t", " ").partition(" ")
        if found.setdefault(name, value.strip()) != value.strip():
            raise UserError(f"{file}:{number}: {name} has another line already")
    return found
