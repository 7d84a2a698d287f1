"""Tar archives: where their members lie, so that a clip is read out of its archive by its place."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from raysft import stores
from raysft.errors import UserError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


class Member(NamedTuple):
    """A file in an archive: its name, and where its bytes lie in the archive's."""

    name: str
    offset: int
    size: int


def members(file: Path) -> Iterator[Member]:
    """The files of an archive, in its order. Raises UserError: it is packed, cut off or no tar;
    OSError."""
    if stores.packed(file):
        raise UserError(
            f"{file} is packed: clips are read out of plain archives; unpack it (gunzip)"
        )
    with stores.random_access(file) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    if member.isfile():
                        yield Member(member.name, member.offset_data, member.size)
                    archive.members = []  # type: ignore[attr-defined]  # it keeps them all
        except tarfile.TarError as error:
            raise UserError(f"{file}: cut off, damaged, or no tar archive: {error}") from None


def read(file: Path, member: Member) -> bytes:
    """The bytes of a member. Raises OSError."""
    with stores.random_access(file) as stream:
        stream.seek(member.offset)
        return stream.read(member.size)


def is_tar(head: bytes) -> bool:
    """By the first bytes of a file."""
    return head[257:262] == b"ustar"


def expanded(pattern: str) -> list[str]:
    """Paths that a pattern stands for: a{0..2}.tar, a{000..127}.tar, {train,dev}.tar. Itself where
    there are no braces of these kinds."""
    if (found := _RANGE.search(pattern)) is not None:
        first, last = int(found[1]), int(found[2])
        width = len(found[1]) if found[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif (found := _CHOICE.search(pattern)) is not None:
        choices = found[1].split(",")
    else:
        return [pattern]
    before, behind = pattern[: found.start()], pattern[found.end() :]
    return [path for choice in choices for path in expanded(f"{before}{choice}{behind}")]
