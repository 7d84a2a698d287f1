"""Files of JSON lines, as a run keeps them: metrics, ledger, quarantine, evaluations, events.

A line is the bytes up to a newline. What ends a process in the middle of one (a kill, a full disk,
a power cut that leaves zeros) spoils that line, wherever it lies and whatever character it cuts;
readers leave it out, say so, and go on with the lines behind it. Only the last line of a file is
not spoken of: it may be one that is just being written. Whoever appends next takes it away.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import IO

from raysft import patience
from raysft.errors import UserError
from raysft.json_types import JsonObject

log = logging.getLogger(__name__)

Line = JsonObject
Kinds = Mapping[str, type]
"""Fields that a line must have, and of which type."""

SHORT = 8 << 20
"""Bytes of a file that is cut back line by line."""
HUGE = 32 << 20
"""Bytes of a file that is truncated where it may be."""

_BLOCK = 1 << 16
_COPIED = 1 << 20
_NAMED = 3  # damaged lines that a message names before it only counts
_told: set[str] = set()


class Lines:
    """An append-only file of JSON lines."""

    def __init__(self, path: Path, new: bool = False) -> None:
        """new: nobody has written into it yet, so no half line is looked for."""
        self.path, self._new = path, new
        self.size = 0  # once something was written
        self._torn: int | None = None  # where half a line begins that is still to be taken away
        self._file = patience.patiently(self._open, path)

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._new:
            _mend_end(self.path)
        return open(self.path, "ab", buffering=0)

    def write(self, values: Line) -> None:
        """Append one line; it is with the operating system when this returns.

        Raises OSError where it cannot be written, for as long as `patience` lasts; of the line
        nothing is there then. Never into another file of its name: see `cut_back`.
        """
        content = encoded(values)
        patience.patiently(lambda: self._append(content), self.path)

    def _append(self, content: bytes) -> None:
        handle = self._file.fileno()
        if self._torn is not None:
            os.ftruncate(handle, self._torn)
            self._torn = None
        before = os.fstat(handle).st_size
        self.size = before + len(content)
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            self._torn = before
            with contextlib.suppress(OSError):  # then before the next line; or the next start does
                os.ftruncate(handle, before)
                self._torn = None
            raise

    def sync(self) -> None:
        """What was written is on the disk when this returns. Not tried again: see `patience`.

        Raises UserError where the system cannot say so.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: its last lines may not be on the disk: {error.strerror or error}; "
                "see to its storage, then start again: the run goes on from its last checkpoint"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def encoded(values: Line) -> bytes:
    """A line, newline included: in UTF-8, or, where a text is none (a file's name may be any
    bytes), with such characters escaped."""
    try:
        return (json.dumps(values, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        return (json.dumps(values) + "\n").encode("ascii")


def parse(raw: bytes, kinds: Kinds | None = None) -> Line:
    """The object in the bytes of a line. Raises ValueError saying what is wrong with it."""
    try:
        line = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(line, dict):
        raise ValueError("no JSON object")
    for key, kind in (kinds or {}).items():
        value = line.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"no {key}")
    return line


def stream_lines(path: Path, kinds: Kinds | None = None) -> Iterator[Line]:
    """The sound lines of a file, one after the other; those that are damaged, or lack a field of
    `kinds`, are left out, and a warning names them, once a process. No file: no line."""
    if not patience.patiently(path.exists, path):
        return
    damaged = _Damaged(path)
    with patience.patiently(lambda: open(path, "rb"), path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = parse(raw, kinds)
            except ValueError as error:
                if raw.endswith(b"\n"):
                    damaged.add(number, str(error))
                continue
            yield line
    damaged.warn()


def read_lines(path: Path, kinds: Kinds | None = None) -> list[Line]:
    """All of `stream_lines`; [] if there is no file."""
    return patience.patiently(lambda: list(stream_lines(path, kinds)), path)


def cut_back(path: Path, step: int, in_place: bool = False) -> str | None:
    """Keep the lines up to `step`, byte for byte; returns what was lost with damaged lines, in
    words, or None. The file is always replaced by another of its name: a worker of an earlier start
    that should still be alive goes on writing into the one that is gone.

    Lines are in the order of their steps; those of step 0 (found before training) may lie anywhere.
    Of a file that is longer than SHORT only the end is parsed, back to what stays for certain.
    in_place: one that is longer than HUGE is truncated instead.
    """
    return patience.patiently(lambda: _cut_back(path, step, in_place), path)


def _cut_back(path: Path, step: int, in_place: bool) -> str | None:
    if not path.exists():
        return None
    size = path.stat().st_size
    if size <= SHORT:
        return _replace(path, step, 0)
    with open(path, "rb") as file:
        start, end, alone = _settled(file, size, step)
    if in_place and alone and end > HUGE:
        return _truncate(path, end)
    return _replace(path, step, start)


def _settled(file: IO[bytes], size: int, step: int) -> tuple[int, int, bool]:
    """(begin, end) of the last line of a step from 1 to `step`: all before it stays; (0, 0) where
    there is none. And whether nothing behind it does."""
    alone = True
    for start, raw in _backwards(file, size):
        with contextlib.suppress(ValueError):
            at = _step(raw)
            if 0 < at <= step:
                return start, start + len(raw), alone
            alone = alone and at > step
    return 0, 0, alone


def _step(raw: bytes) -> int:
    """Of a line; 0 where it names none. Raises ValueError where it is damaged."""
    at = parse(raw).get("step", 0)
    if not isinstance(at, int) or isinstance(at, bool):
        raise ValueError("no step")
    return at


def _replace(path: Path, step: int, start: int) -> str | None:
    """What lies before byte `start` is copied, what lies behind it goes line by line."""
    temporary = path.with_name(f".{path.name}.tmp")
    damaged = _Damaged(path)
    try:
        with open(path, "rb") as file, open(temporary, "wb") as out:
            before = 0
            while start:
                block = file.read(min(_COPIED, start))
                start -= len(block) or start  # a file that ends here ends the copy
                before += block.count(b"\n")
                out.write(block)
            for number, raw in enumerate(file, start=before + 1):
                try:
                    at = _step(raw)
                except ValueError as error:
                    damaged.add(number, str(error) if raw.endswith(b"\n") else "cut off")
                    continue
                if at <= step:
                    out.write(raw if raw.endswith(b"\n") else raw + b"\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return damaged.said()


def _truncate(path: Path, end: int) -> str | None:
    """Nothing behind byte `end`, where a line ends, is kept."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(end, size - 1))
        torn = size > end and file.read(1) != b"\n"
        file.truncate(end)
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.seek(end)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
    return f"{path}: damaged, and left out: its last line (cut off)" if torn else None


def _backwards(file: IO[bytes], end: int) -> Iterator[tuple[int, bytes]]:
    """The lines before byte `end`, newlines included, the last first, and where each begins."""
    rest, at, size = b"", end, _BLOCK
    while at:
        size = min(size, at)
        at -= size
        file.seek(at)
        head, *lines = (file.read(size) + rest).split(b"\n")
        if not lines:  # a line longer than this: twice as much, or it would take squared time
            rest, size = head, 2 * size
            continue
        position = at + len(head) + 1 + sum(map(len, lines)) + len(lines) - 1
        newline = b""
        for line in reversed(lines):
            if line or newline:
                position -= len(line) + len(newline)
                yield position, line + newline
            newline = b"\n"
        rest, size = head + b"\n", _BLOCK
    if rest:
        yield 0, rest


def last_step(path: Path) -> int:
    """The step of the last sound line of a file in the order of steps; 0 without any. Reads its
    end."""

    def last() -> int:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            for _, raw in _backwards(file, file.seek(0, os.SEEK_END)):
                with contextlib.suppress(ValueError):
                    return int(parse(raw, {"step": int})["step"])
        return 0

    return patience.patiently(last, path)


def _mend_end(path: Path) -> None:
    """A kill or a full disk cut the last line off; what is appended must not become its end."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if not size or file.read() == b"\n":
            return
        start, raw = next(_backwards(file, size))
        try:
            parse(raw)
        except ValueError:
            file.seek(0)
            number = 1
            for left in range(start, 0, -_COPIED):
                number += file.read(min(_COPIED, left)).count(b"\n")
            file.truncate(start)
            damaged = _Damaged(path)
            damaged.add(number, "cut off")
            damaged.warn()
        else:  # only its newline is missing
            file.seek(size)
            file.write(b"\n")


class _Damaged:
    """Lines of a file that cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._named: list[str] = []
        self._count = 0

    def add(self, number: int, what: str) -> None:
        """Line `number`, counted from 1."""
        self._count += 1
        if self._count <= _NAMED:
            self._named.append(f"line {number} ({what})")

    def said(self) -> str | None:
        """One line for people; None where all was sound."""
        if not self._count:
            return None
        more = f" and {self._count - _NAMED:,} more" if self._count > _NAMED else ""
        return f"{self._path}: damaged, and left out: {', '.join(self._named)}{more}"

    def warn(self) -> None:
        """Say it, once."""
        said = self.said()
        if said is not None and said not in _told:
            _told.add(said)
            log.warning("%s", said)
