"""What every container shares: bytes of a file, and libsndfile over a view of them.

Stands under `audio.probe` and `audio.load`. A container module says how long a file is and decodes
it; this one reads bytes, and is the only one that calls libsndfile. Whatever goes wrong in a
decoder is about the file it was given: every exception of it becomes a BadExample.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import soundfile

from raysft.errors import BadExample

MISSING_SHARE = 0.05  # of the samples a header promises that may be absent without complaint
ENDLESS = 1 << 40  # libsndfile says 2^63 - 1 where a stream was written without a length
_BLOCK = 1 << 18  # samples, of all channels, decoded at once where the length is not known

Piece = tuple[np.ndarray, int]
"""Decoded samples: float32 [samples, channels], and their rate in Hz."""


class File:
    """A regular file, read at any place. Raises BadExample where the system refuses."""

    def __init__(self, path: str) -> None:
        self.path = path
        with _reading(path):
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._handle).st_size

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset` on: fewer only at the end of the file."""
        parts = []
        with _reading(self.path):
            while count > 0 and (part := os.pread(self._handle, count, offset)):
                parts.append(part)
                offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Give the handle back."""
        os.close(self._handle)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadExample(f"{path}: cannot be read ({error.strerror or error})") from None


class View(io.RawIOBase):
    """The bytes [start, stop) of a file, some of them replaced: what libsndfile is given to read.

    patches: {offset in the file: bytes}. error: the BadExample of a read that failed, which
    libsndfile takes for the end of the file.
    """

    def __init__(
        self,
        file: File,
        start: int = 0,
        stop: int | None = None,
        patches: dict[int, bytes] | None = None,
    ) -> None:
        self._file, self._start = file, start
        self._size = (file.size if stop is None else stop) - start
        self._patches = patches or {}
        self._at = 0
        self.error: BadExample | None = None

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
        first = self._start + self._at
        try:
            data = self._file.read(first, min(len(buffer), max(0, self._size - self._at)))
        except BadExample as error:
            self.error = error
            return 0
        for offset, patch in self._patches.items():
            if offset < first + len(data) and first < offset + len(patch):
                changed = bytearray(data)
                for at in range(max(offset, first), min(offset + len(patch), first + len(data))):
                    changed[at - first] = patch[at - offset]
                data = bytes(changed)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Sound(soundfile.SoundFile):
    """soundfile's, for threads and for formats that libsndfile cannot seek in.

    soundfile 0.14 opens one file at a time in a process, for the sake of error messages: a file
    whose storage hangs would hold up all the others, and headers are to be awaited together.
    """

    _sf_error_lock = contextlib.nullcontext()

    def seekable(self) -> bool:
        """No: soundfile then reads on from where it is, as libsndfile can in every format."""
        return False


@dataclass
class Track:
    """A file that makes sense so far: nothing of it is decoded.

    rate: Hz. samples: of a channel, as certain as can be told without decoding; None: only
    decoding tells. decode(most): all pieces, one after the other; may stop once it has more than
    `most` samples.
    """

    rate: int
    samples: int | None
    decode: Callable[[float], list[Piece]]


@contextlib.contextmanager
def decoding(path: str, view: io.RawIOBase | None = None) -> Iterator[None]:
    """Names the file that a decoder fails on, whatever it raises."""
    try:
        yield
    except BadExample:
        raise
    except MemoryError:
        raise BadExample(f"{path}: its samples do not fit into memory") from None
    except Exception as error:  # noqa: BLE001 - of whatever kind, it is about this file
        if isinstance(view, View) and view.error is not None:
            raise view.error from None
        if isinstance(error, soundfile.LibsndfileError):
            detail = error.error_string or f"libsndfile error {error.code}"
        else:
            detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise BadExample(f"{path}: damaged or cut off: decoding failed ({detail})") from None
    if isinstance(view, View) and view.error is not None:
        raise view.error


def sound(path: str, view: io.RawIOBase) -> Sound:
    """libsndfile's view of bytes. Raises BadExample where they are no audio to it."""
    try:
        return Sound(view)
    except Exception:  # noqa: BLE001 - of whatever kind, it is about this file
        if isinstance(view, View) and view.error is not None:
            raise view.error from None
        # Not libsndfile's own words: they may be those about a file another thread opens now.
        view.seek(0)
        head = view.read(16)
        raise BadExample(f"{path}: not audio that can be read (it begins with {head!r})") from None


def read_all(path: str, view: io.RawIOBase, most: float, exact: int | None = None) -> Piece:
    """Decode what libsndfile finds, to the end.

    exact: samples that are there, where that is known. Where it is not, or is more than `most`,
    reading stops after `most` of them.
    """
    with sound(path, view) as file, decoding(path, view):
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


def resampled_length(samples: int, from_rate: int, to_rate: int) -> int:
    """Samples a clip has after resampling: samples * to_rate / from_rate, halves rounded up."""
    return (2 * samples * to_rate + from_rate) // (2 * from_rate)


def check_whole(path: str, present: float, promised: float, what: str) -> None:
    """Raises BadExample where much of what a header promises is not there."""
    if present < promised * (1 - MISSING_SHARE):
        raise BadExample(f"{path}: cut off: {present:.0f} of {promised:.0f} {what} are there")
