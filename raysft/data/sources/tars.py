"""Tar archives: where their members lie, so that a clip is read out of its archive by its place."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from raysft import stores
from raysft.errors import UserError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BLOCK = 512
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


class Member(NamedTuple):
    """A file in an archive: its name, and where its bytes lie in the archive's."""

    name: str
    offset: int
    size: int


def members(file: Path) -> Iterator[Member]:
    """The files of an archive, in its order. Raises UserError: it is packed, cut off, damaged,
    several joined end to end, holds links, or is no tar; OSError."""
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
                    elif member.islnk() or member.issym():
                        raise UserError(
                            f"{file}: {member.name} is a link to {member.linkname}, and links are "
                            "not followed: write the archive anew with tar --hard-dereference -h"
                        )
                    archive.members = []  # type: ignore[attr-defined]  # it keeps them all
                _check_end(file, stream, archive.offset)
        except tarfile.TarError as error:
            raise UserError(f"{file}: cut off, damaged, or no tar archive: {error}") from None


def _check_end(file: Path, stream: BinaryIO, at: int) -> None:
    """That nothing but its end lies where `tarfile` stopped: it takes a header that is damaged or
    cut off for the end, and reads the first alone of archives that were joined."""
    stream.seek(at)
    head = stream.read(_BLOCK)
    if head.strip(b"\0"):
        raise UserError(
            f"{file}: cut off or damaged at byte {at:,}, where a member or the end is to be: what "
            "follows cannot be read; write or fetch it anew"
        )
    while block := stream.read(1 << 20):
        if block.strip(b"\0"):
            raise UserError(
                f"{file}: something follows its end: archives joined by cat are read as the first "
                "alone; name each of them, or join them with tar --concatenate"
            )


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
    there are no braces of these kinds. Raises UserError for a range that counts down."""
    if (found := _RANGE.search(pattern)) is not None:
        first, last = int(found[1]), int(found[2])
        width = len(found[1]) if found[1].startswith("0") else 0
        if last < first:
            raise UserError(f"{pattern}: {found[0]} holds nothing: {{{last}..{first}}} does")
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif (found := _CHOICE.search(pattern)) is not None:
        choices = found[1].split(",")
    else:
        return [pattern]
    before, behind = pattern[: found.start()], pattern[found.end() :]
    return [path for choice in choices for path in expanded(f"{before}{choice}{behind}")]
