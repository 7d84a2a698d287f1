"""Records of a data file, read again by their places: what the index says, never what is parsed.

Stands between the index (its `examples`, and items that are measured again) and the formats.
`fetch` is for everyone who reads records; how a format finds them is `Format.fetch`, and where a
file is text they are byte ranges of it (`byte_ranges`). Costs a read for records that lie near
each other, and 2 us a record.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from raysft import patience

if TYPE_CHECKING:
    from raysft.data.sources.base import Format

GAP = 1 << 14  # bytes between two records below which one read fetches both
SPAN = 8 << 20  # bytes of one read


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item lies in its data file; see `Item`. line: 0 where nobody is told of it."""

    line: int
    offset: int
    size: int


class Closes(Protocol):
    """What can be kept open of a file."""

    def close(self) -> None:
        """Give it back."""


_Kept = TypeVar("_Kept", bound=Closes)


class OpenFile:
    """A data file, and what a format keeps open of it from one fetch to the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: Any = None

    def kept(self, opened: Callable[[Path], _Kept]) -> _Kept:
        """opened(path): made by the first call, and anew by the first one after `close`."""
        if self._kept is None:
            self._kept = opened(self.path)
        return self._kept

    def close(self) -> None:
        """Give back what was kept."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()

    def __del__(self) -> None:
        self.close()


def fetch(
    form: Format,
    file: OpenFile,
    places: Sequence[Place],
    lock: contextlib.AbstractContextManager[object] | None = None,
) -> Iterator[bytes]:
    """The records at `places`, as `Format.fetch` gives them, with patience: where the storage
    fails, the file is opened anew, and what is left of the places is fetched again.

    lock: held while one is read. Raises UserError where the storage goes on failing.
    """
    records: Iterator[bytes] | None = None
    done = 0

    def following() -> bytes:
        nonlocal records
        try:
            if records is None:
                records = form.fetch(file, places[done:])
            record = next(records, None)
        except OSError:
            records = None
            file.close()  # a stale handle stays so
            raise
        assert record is not None, f"{form.name}: fewer records than places"
        return record

    while done < len(places):
        with lock or contextlib.nullcontext():
            record = patience.known(following, file.path)
        yield record
        done += 1


def byte_ranges(file: OpenFile, places: Sequence[Place]) -> Iterator[bytes]:
    """The bytes at `places`; those near each other in one read. Fewer only where the file has
    become shorter.

    Shuffled, records lie anywhere in a file: the system is told of all its reads before the
    first, so that slow storage fetches them at once and not one after the other. Raises OSError.
    """
    spans = _spans(places)
    for number, (start, stop, inside) in enumerate(spans):
        handle = file.kept(_Handle)
        if number == 0:
            handle.tell((begin, end - begin) for begin, end, _ in spans[1:])
        data = handle.read(start, stop - start)
        for place in inside:
            at = place.offset - start
            yield data[at : at + place.size]


class _Handle:
    """A file opened to be read at any place."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY)

    def tell(self, reads: Iterator[tuple[int, int]]) -> None:
        """reads: (offset, bytes) of those to come."""
        for offset, size in reads if hasattr(os, "posix_fadvise") else ():  # not on macOS
            os.posix_fadvise(self._handle, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, count: int) -> bytes:
        """Fewer bytes only at the end of the file. Raises OSError."""
        data = os.pread(self._handle, count, offset)
        if len(data) < count and os.fstat(self._handle).st_size >= offset + count:
            raise OSError(errno.EIO, f"{len(data)} of {count} bytes read")
        return data

    def close(self) -> None:
        os.close(self._handle)


def _spans(places: Sequence[Place]) -> list[tuple[int, int, list[Place]]]:
    """Reads of the records at `places`: first byte, last + 1, and the places they are for."""
    spans: list[tuple[int, int, list[Place]]] = []
    for place in places:
        end = place.offset + place.size
        if spans:
            start, stop, inside = spans[-1]
            if start <= place.offset < stop + GAP and end - start <= SPAN:
                inside.append(place)
                spans[-1] = start, max(stop, end), inside
                continue
        spans.append((place.offset, end, [place]))
    return spans
