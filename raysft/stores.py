"""Where data lies: files of this system, and objects in stores (s3://, gs://, hf://, https://).

Stands under everything that reads data. Stores are fsspec's: whatever protocol it knows, with the
credentials and end points of the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, HF_TOKEN,
GOOGLE_APPLICATION_CREDENTIALS), never of a config or of data. Whatever goes wrong while a store is
asked is the store's, and an OSError as of a disk, so that `patience` decides what becomes of it:
FileNotFoundError where it says that there is no such object. A request that fails is made four
times, half a second in all.

Costs a round trip a call: what is read is to be asked for in few, large pieces, several at once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import io
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar, cast

from raysft.errors import UserError, first_line

if TYPE_CHECKING:
    from upath import UPath

_NEEDS = {
    "s3": "raysft[s3]",
    "s3a": "raysft[s3]",
    "gs": "raysft[gcs]",
    "gcs": "raysft[gcs]",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
"""What is to be installed for a protocol beside fsspec."""

_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")
_AT_ONCE = 32  # requests
_PAUSE, _LONGEST = 0.05, 0.5  # seconds between the tries of a request: 0.05, 0.15, 0.45
_BLOCK = 1 << 22  # bytes fetched at once of an object that is read from its beginning
_FIRST = 1 << 16  # bytes fetched at first: mostly no more than the head is wanted
_remembered: ContextVar[dict[tuple[object, ...], object] | None] = ContextVar("seen", default=None)
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class Status(NamedTuple):
    """Bytes of a file or object, and when it changed (ns; a number made of its entity tag where a
    store keeps no times; 0: it tells neither)."""

    size: int
    mtime_ns: int


def is_remote(place: str | Path) -> bool:
    """Whether `place` (absolute) is an object in a store."""
    return "://" in (place if isinstance(place, str) else str(place))


def at(place: str) -> Path:
    """`place` (absolute, or a URL) as a path: what `Path` does, of objects too.

    Raises UserError where a store's protocol is not known, or what it needs is not installed.
    """
    if not is_remote(place):
        return Path(place)
    from upath import UPath

    protocol = place.partition("://")[0]
    try:
        found = UPath(place)
        with asking(place):
            _ = found.fs
    except (ImportError, ValueError) as error:
        needs = _NEEDS.get(protocol)
        remedy = f": pip install '{needs}' on every node" if needs else ""
        raise UserError(
            f"{place}: {protocol}:// cannot be read here{remedy} ({first_line(error)})"
        ) from None
    return cast(Path, found)


def refresh(file: Path) -> None:
    """Forget what a store was heard to hold: it is asked anew."""
    if is_remote(file):
        cast("UPath", file).fs.invalidate_cache()


@contextlib.contextmanager
def asking(place: str | Path) -> Iterator[None]:
    """What a store's library raises becomes an OSError that names `place`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        kinds = ((FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES))
        number = next((number for kind, number in kinds if isinstance(error, kind)), errno.EIO)
        raise OSError(number, first_line(error) or os.strerror(number), str(place)) from error
    except (ImportError, MemoryError, UserError):
        raise
    except Exception as error:  # of whatever kind: it is the store's
        detail = first_line(error) or type(error).__name__
        raise OSError(errno.EIO, f"{type(error).__name__}: {detail}", str(place)) from error


def damage(error: Exception) -> str:
    """What a library says of a file that it cannot make sense of, in a line. Raises `error` itself
    where that is the storage's: it has a number then."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return first_line(error) or type(error).__name__


def status(place: str) -> Status:
    """Of an object. Raises OSError; IsADirectoryError where it is a folder of objects."""
    info = _info(place)
    if info.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, "is a folder", place)
    return _status(info)


def _info(place: str) -> dict[str, object]:
    path = _path(place)
    return recall(("info", place), lambda: _asked(place, lambda: path.fs.info(path.path)))


def entries(folder: Path, most: int) -> list[tuple[Path, bool]]:
    """Up to `most` of a folder's entries by name, and whether each is a folder. Raises OSError."""
    if is_remote(folder):
        path = _path(str(folder))
        found = _asked(str(folder), lambda: path.fs.ls(path.path, detail=True))
        there = {str(one["name"]).rstrip("/").rpartition("/")[2]: one["type"] for one in found}
        named = [(folder / name, kind == "directory") for name, kind in there.items() if name]
    else:
        with os.scandir(folder) as found:
            named = [(folder / one.name, one.is_dir()) for one in islice(found, most)]
    return sorted(named)[:most]


def below(folder: Path) -> list[Path]:
    """Every object below a folder of a store. Raises OSError."""
    path = _path(str(folder))
    top = path.path.rstrip("/")
    found = _asked(str(folder), lambda: path.fs.find(path.path))
    return [folder / str(name)[len(top) + 1 :] for name in sorted(found)]


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Within a `with` block what `recall` was told stays so: many who look share one look."""
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def recall(key: tuple[object, ...], look: Callable[[], _Answer]) -> _Answer:
    """look(), or within `remembering` what it came to for this key before."""
    known = _remembered.get()
    if known is None:
        return look()
    if key not in known:
        known[key] = look()
    return cast(_Answer, known[key])


def is_dir(file: Path) -> bool:
    """Whether there is such a folder. Of a store: raises OSError where it does not tell, which
    fsspec's own would take for a no."""
    return _kind(file) == "directory" if is_remote(file) else file.is_dir()


def is_file(file: Path) -> bool:
    """Whether there is such a file or object. Raises as `is_dir`."""
    return _kind(file) == "file" if is_remote(file) else file.is_file()


def at_once(question: Callable[[_Asked], _Answer], items: Sequence[_Asked]) -> list[_Answer]:
    """[question(item) for item in items], many waited for at once: each may be a request."""
    if len(items) < 2:
        return [question(item) for item in items]
    with ThreadPoolExecutor(min(_AT_ONCE, len(items)), "stores") as pool:
        return list(pool.map(question, items))


def _kind(file: Path) -> object:
    """file, directory, or None where there is nothing."""
    try:
        return _info(str(file)).get("type")
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def _asked(place: str, call: Callable[[], _Answer]) -> _Answer:
    """What a request comes to, made again a few times where it fails for a moment."""
    pause = _PAUSE
    while True:
        try:
            with asking(place):
                return call()
        except OSError as error:
            passing = error.errno not in (errno.ENOENT, errno.EACCES, errno.EISDIR)
            if not passing or pause > _LONGEST:
                raise
            time.sleep(pause)
            pause *= 3


def state(file: Path) -> Status:
    """Of a file or object. Raises OSError."""
    if is_remote(file):
        return status(str(file))
    found = file.stat()
    return Status(found.st_size, found.st_mtime_ns)


def _status(info: dict[str, object]) -> Status:
    size = info.get("size")
    changed = next(
        (info[k] for k in ("LastModified", "mtime", "updated", "created") if info.get(k)), None
    )
    if isinstance(changed, datetime):
        mtime = int(changed.timestamp() * 1_000_000) * 1000
    elif isinstance(changed, int | float):
        mtime = int(changed * 1e9)
    else:
        tag = changed or info.get("ETag") or info.get("etag") or info.get("oid") or ""
        mtime = zlib.crc32(str(tag).encode()) if tag else 0
    return Status(size if isinstance(size, int) else -1, mtime)


def read(place: str, offset: int, count: int) -> bytes:
    """Bytes [offset, offset + count) of an object, fewer where it ends. Raises OSError."""
    if count <= 0:
        return b""
    path = _path(place)
    fetch = path.fs.cat_file
    return bytes(_asked(place, lambda: fetch(path.path, start=offset, end=offset + count)))


@functools.lru_cache(maxsize=65536)
def _path(place: str) -> UPath:
    return cast("UPath", at(place))


def opened(file: Path) -> BinaryIO:
    """A file or object, to be read from its beginning; unpacked where it is gzip's or zstd's, by
    its first bytes. Raises OSError; UserError where zstd's unpacker is not installed."""
    stream = random_access(file)
    head = stream.read(4)
    stream.seek(0)
    if head.startswith(_GZIP):
        return cast(BinaryIO, gzip.open(stream))
    if head == _ZSTD:
        return _unpacked_zstd(file, stream)
    return stream


def random_access(file: Path) -> BinaryIO:
    """A file or object, to be read anywhere, as it is. Raises OSError."""
    if is_remote(file):
        with asking(file):
            return cast(BinaryIO, io.BufferedReader(_Object(file), 1 << 20))
    return open(file, "rb")


def packed(file: Path) -> bool:
    """Whether `opened` unpacks it. Raises OSError."""
    if is_remote(file):
        head = read(str(file), 0, 4)
    else:
        with open(file, "rb") as stream:
            head = stream.read(4)
    return head.startswith(_GZIP) or head == _ZSTD


def _unpacked_zstd(file: Path, stream: BinaryIO) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{file} is packed with zstd: pip install zstandard on every node, or unpack it "
            "(zstd -d)"
        ) from None
    return cast(BinaryIO, zstandard.open(stream, "rb"))


class _Object(io.RawIOBase):
    """An object read block by block, each with a request of its own: what fails can be tried again
    by whoever reads, at the place it stands."""

    def __init__(self, file: Path) -> None:
        self._place = str(file)
        self._size = status(self._place).size
        self._at = 0
        self._block, self._start = b"", 0
        self._next = _FIRST

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer`, or what is left of the block."""
        inside = self._at - self._start
        if not 0 <= inside < len(self._block):
            behind = inside - len(self._block)
            on = bool(self._block) and 0 <= behind <= len(self._block)  # read on, or nearly
            self._next = min(4 * self._next, _BLOCK) if on else _FIRST
            left = max(0, self._size - self._at)  # behind the end a store refuses to read
            self._block = read(self._place, self._at, min(left, self._next))
            self._start, inside = self._at, 0
        data = self._block[inside : inside + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
