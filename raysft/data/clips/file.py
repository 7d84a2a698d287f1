"""What every container shares: bytes of a file, and libsndfile over a view of them.

Stands under `audio.probe` and `audio.load`. A container module says how long a file is and decodes
it; this one reads bytes, and is the only one that calls libsndfile. Whatever goes wrong in a
decoder is about the file it was given: every exception of it becomes a BadExample. Whatever goes
wrong in reading bytes is about the storage: an OSError, which decoders would take for a file's end;
so `File` remembers it, and whoever opened the file raises it in place of what they made of it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import soundfile

from raysft import stores
from raysft.data.clips import cells
from raysft.data.example import Cell, Within
from raysft.errors import BadExample

MISSING_SHARE = 0.05  # of the samples a header promises that may be absent without complaint
ENDLESS = 1 << 40  # libsndfile says 2^63 - 1 where a stream was written without a length
_HELD = 1 << 26  # bytes of the largest file that is held in memory while it is decoded
_ASKED = 1 << 18  # bytes of an object that are asked for at least: a round trip takes as long
_AHEAD = 1 << 12  # bytes
_BLOCK = 1 << 18  # samples, of all channels, decoded at once where the length is not known

Piece = tuple[np.ndarray, int]
"""Decoded samples: float32 [samples, channels], and their rate in Hz."""


class File:
    """A regular file, an object in a store, or a file inside of another, read at any place. Raises
    OSError where the system or the store refuses.

    error: of the first read that failed, or that ended before the file does.
    """

    def __init__(
        self,
        path: str,
        hold: bool = False,
        content: bytes | None = None,
        held: Within | Cell | None = None,
        size: int | None = None,
    ) -> None:
        """path: of the file, or what messages call it. hold: read it once, as it will be needed
        whole, unless it is very large. content: all of it, where it is no file of the system's.
        held: where it lies in another file. size: of a whole object, where it is known."""
        self.path = path
        self.error: OSError | None = None
        self._content = content
        self._handle: int | None = None
        self._place, self._base = path, 0
        self._ahead, self._ahead_at = b"", 0  # of an object: what was fetched last
        within = held if isinstance(held, Within) else None
        if isinstance(held, Cell):
            self._content = content = cells.read(held)
        if content is not None:
            self.size = len(content)
            return
        if within is not None:
            self._place, self._base = within.file, within.offset
        self._remote = stores.is_remote(self._place)
        if not self._remote:
            self._handle = os.open(self._place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size = self._whole(size) if within is None else within.size
            if within is not None and self._handle is not None:
                there = os.fstat(self._handle).st_size
                if there < within.offset + within.size:
                    raise BadExample(
                        f"{path}: cut off: its file has {there:,} bytes, and it lies behind them",
                        "truncated",
                    )
            if (hold and self.size <= _HELD) or (self._remote and self.size <= _ASKED):
                self._content = self.read(0, self.size)
        except (OSError, BadExample):
            self.close()
            raise

    def _whole(self, known: int | None) -> int:
        """Bytes of a file that lies in no other."""
        if self._handle is not None:
            return os.fstat(self._handle).st_size
        return stores.status(self._place).size if known is None else known

    @property
    def held(self) -> bool:
        """Whether all of it is in memory."""
        return self._content is not None

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset` on: fewer only at the end of the file."""
        if self._content is not None:
            return self._content[offset : offset + max(0, count)]
        count = max(0, min(count, self.size - offset))
        try:
            data = self._fetched(offset, count) if self._remote else self._stored(offset, count)
            if len(data) < count:
                told = f"ends at byte {offset + len(data):,} of {self.size:,}"
                raise OSError(errno.EIO, told, self.path)
        except OSError as error:
            self.error = self.error or error
            raise
        return data

    def _stored(self, offset: int, count: int) -> bytes:
        parts = []
        handle, offset = cast(int, self._handle), self._base + offset  # it is not closed
        while count > 0 and (part := os.pread(handle, count, offset)):
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fetched(self, offset: int, count: int) -> bytes:
        """Of an object: headers and the like are read in small pieces, asked for together."""
        inside = offset - self._ahead_at
        if not 0 <= inside <= inside + count <= len(self._ahead):
            wanted = min(max(count, _ASKED), self.size - offset)
            self._ahead = stores.read(self._place, self._base + offset, wanted)
            self._ahead_at, inside = offset, 0
        return self._ahead[inside : inside + count]

    def view(
        self, start: int = 0, stop: int | None = None, patches: dict[int, bytes] | None = None
    ) -> io.RawIOBase | io.BytesIO:
        """The bytes [start, stop), some of them replaced: what a decoder is given to read.

        patches: {offset in the file: bytes}.
        """
        stop = self.size if stop is None else stop
        if self._content is None:
            return View(self, start, stop, patches or {})
        if not patches:
            return io.BytesIO(self._content[start:stop])
        return io.BytesIO(_patched(self._content[start:stop], start, patches))

    def close(self) -> None:
        """Give the handle back."""
        if self._handle is not None:
            os.close(self._handle)


def _patched(data: bytes, first: int, patches: dict[int, bytes]) -> bytes:
    """data: the bytes of a file from `first` on; patches: {offset in the file: bytes}."""
    for offset, patch in patches.items():
        if offset < first + len(data) and first < offset + len(patch):
            changed = bytearray(data)
            for at in range(max(offset, first), min(offset + len(patch), first + len(data))):
                changed[at - first] = patch[at - offset]
            data = bytes(changed)
    return data


class View(io.RawIOBase):
    """Bytes of a file that is not held in memory; read ahead a little, for headers are read in
    small pieces. A read that fails looks like the end of the file: see `File.error`."""

    def __init__(self, file: File, start: int, stop: int, patches: dict[int, bytes]) -> None:
        self._file, self._start, self._size = file, start, stop - start
        self._patches = patches
        self._at = 0
        self._ahead, self._ahead_at = b"", 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` as far as the view goes."""
        count = min(len(buffer), max(0, self._size - self._at))
        place = self._at - self._ahead_at
        if not (place >= 0 and place + count <= len(self._ahead)):
            wanted = min(max(count, _AHEAD), max(0, self._size - self._at))
            first = self._start + self._at
            try:
                self._ahead = _patched(self._file.read(first, wanted), first, self._patches)
            except OSError:
                return 0
            self._ahead_at, place = self._at, 0
        data = self._ahead[place : place + count]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Sound(soundfile.SoundFile):
    """soundfile's, for threads and for formats that libsndfile cannot seek in.

    soundfile 0.14 opens one file at a time in a process, for the sake of error messages: a file
    whose storage hangs would hold up all the others, and headers are to be awaited together.
    """

    _sf_error_lock = contextlib.nullcontext()
    view: io.RawIOBase | io.BytesIO

    def seekable(self) -> bool:
        """No: soundfile then reads on from where it is, as libsndfile can in every format."""
        return False


@dataclass
class Track:
    """A file that makes sense so far: nothing of it is decoded.

    rate: Hz. samples: of a channel, as certain as can be told without decoding; None: only
    decoding tells. decode(most): all pieces, one after the other; may stop once it has more than
    `most` samples. close: to be called in the end. count(most): how many samples decode(most)
    gives, in little memory; None: decode to see. channels: None: not the same everywhere.
    part(first, last): samples [first, last) alone, float32 [samples, channels], in place of
    `decode`; None: what comes before them has to be decoded too.
    """

    rate: int
    samples: int | None
    decode: Callable[[float], list[Piece]]
    close: Callable[[], None] = lambda: None
    count: Callable[[float], int] | None = None
    channels: int | None = None
    part: Callable[[int, int], np.ndarray] | None = None


@contextlib.contextmanager
def decoding(path: str) -> Iterator[None]:
    """Names the file that a decoder fails on, whatever it raises."""
    try:
        yield
    except BadExample:
        raise
    except MemoryError:
        raise BadExample(f"{path}: its samples do not fit into memory") from None
    except Exception as error:  # noqa: BLE001 - of whatever kind, it is about this file
        if isinstance(error, soundfile.LibsndfileError):
            detail = error.error_string or f"libsndfile error {error.code}"
        else:
            detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise BadExample(
            f"{path}: damaged or cut off: decoding failed ({detail})", "truncated"
        ) from None


def sound(path: str, view: io.RawIOBase | io.BytesIO) -> Sound:
    """libsndfile over bytes. Raises BadExample where they are no audio to it."""
    try:
        opened = Sound(view)
    except Exception:  # noqa: BLE001 - of whatever kind, it is about this file
        # Not libsndfile's own words: they may be those about a file another thread opens now.
        view.seek(0)
        head = view.read(16)
        raise BadExample(
            f"{path}: not audio that can be read (it begins with {head!r})", "not audio"
        ) from None
    opened.view = view
    return opened


def read_all(path: str, view: io.RawIOBase | io.BytesIO, most: float) -> Piece:
    """Decode what libsndfile finds to its end, or until there are more than `most` samples."""
    with sound(path, view) as file:
        return read(path, file, most)


def read(path: str, file: Sound, most: float, exact: int | None = None) -> Piece:
    """As `read_all`, of a file just opened. exact: samples that are there, where that is known."""
    with decoding(path):
        if exact is not None and exact <= most:
            return file.read(frames=exact, dtype="float32", always_2d=True), file.samplerate
        block = max(1, _BLOCK // file.channels)
        parts, count = [np.zeros((0, file.channels), np.float32)], 0
        while count <= most:
            parts.append(file.read(frames=block, dtype="float32", always_2d=True))
            if not len(parts[-1]):
                break
            count += len(parts[-1])
        return np.concatenate(parts), file.samplerate


def read_part(path: str, file: Sound, first: int, last: int) -> np.ndarray:
    """Samples [first, last) of a file just opened that libsndfile can enter anywhere."""
    with decoding(path):
        file.seek(first)
        samples = file.read(frames=last - first, dtype="float32", always_2d=True)
    check_whole(path, len(samples), last - first, "samples")
    return samples


def resampled_length(samples: int, from_rate: int, to_rate: int) -> int:
    """Samples a clip has after resampling: samples * to_rate / from_rate, halves rounded up."""
    return (2 * samples * to_rate + from_rate) // (2 * from_rate)


def check_whole(path: str, present: float, promised: float, what: str) -> None:
    """Raises BadExample where much of what a header promises is not there."""
    if present < promised * (1 - MISSING_SHARE):
        raise BadExample(
            f"{path}: cut off: {present:.0f} of {promised:.0f} {what} are there", "truncated"
        )
