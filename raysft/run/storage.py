"""Where checkpoints lie: a folder, or a place in any store that fsspec knows (s3://, gs://, ...).

Both offer the same few things: a file is written whole and durably or not at all, a checkpoint is
prepared where no reader looks and then published in one act.

    Folder   prepared under a hidden name of its own; published by one rename
    Store    objects have no rename: prepared below a name of its own in its checkpoint's; published
             by its marker, written last

So whoever saves writes, up to the act of publishing, where nobody else writes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from raysft import paths, patience
from raysft.errors import UserError

_BLOCK = 1 << 20
CLAIM = "claimed_by.json"
"""Beside the checkpoints of a place that runs could share: whose they are; see `run.place`."""


class Storage(Protocol):
    """A place for named checkpoints. Names and paths inside them have "/" between parts."""

    def names(self) -> list[str]:
        """Of all checkpoints, whole or not."""
        ...

    def where(self, name: str) -> str:
        """A checkpoint's folder or URL, for messages and for torch."""
        ...

    def draft(self, name: str, token: str) -> str:
        """The name under which the save called `token` prepares checkpoint `name`. Of two saves of
        one checkpoint the one whose token sorts last is the newer."""
        ...

    def roots(self, name: str) -> list[str]:
        """Where the files of checkpoint `name` may lie, the newest save of it first; those of a
        save without its marker are nobody's."""
        ...

    def publish(self, draft: str, name: str, marker: str, content: bytes) -> None:
        """Write the marker; from then on, and not before, the checkpoint is there. Raises
        UserError where someone else has published it meanwhile."""
        ...

    def withdraw(self, name: str, marker: str) -> None:
        """Take the marker away, so that no reader sees the checkpoint any more."""
        ...

    def remove(self, name: str) -> None:
        """Delete a checkpoint that has no marker."""
        ...

    def files(self, name: str) -> list[str]:
        """Paths of the files of a checkpoint, relative to it."""
        ...

    def open(self, path: str) -> IO[bytes]:
        """Read a file. Raises OSError where it cannot be read."""
        ...

    def write(self, path: str, content: bytes) -> None:
        """Write a file durably: whole or not at all. Raises OSError."""
        ...

    def copy(self, source: str, path: str) -> None:
        """Put a file of another run's storage of this kind, named as `where` does, to a path where
        there is none yet. Files of checkpoints never change, so it may be the same one."""
        ...


def open_storage(run: Path, place: str | None) -> Storage:
    """The run folder's `checkpoints`, or a folder of the run's name below `checkpoint.path` (where
    that is relative: below the folder of runs). Raises UserError for an unknown kind of URL."""
    if place is None:
        return Folder(run / "checkpoints")
    if not paths.is_store(place):  # written whole and durably, as fsspec's own would not be
        below = paths.absolute(place.removeprefix("local://"), str(run.absolute().parent))
        return Folder(Path(below) / run.name)
    return Store(f"{place.rstrip('/')}/{run.name}")


def digest(stream: IO[bytes]) -> tuple[str, int]:
    """sha256 (hex) and length of what is left in a stream; 1.4 GB/s on one core."""
    found, size = hashlib.sha256(), 0
    while block := stream.read(_BLOCK):
        found.update(block)
        size += len(block)
    return found.hexdigest(), size


class Folder:
    """Checkpoints below a folder that all workers share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Of all checkpoints, whole or not; hidden ones are drafts."""

        def names() -> list[str]:
            if not self.root.is_dir():
                return []
            return [path.name for path in self.root.iterdir() if path.name != CLAIM]

        return patience.patiently(names, self.root)

    def where(self, name: str) -> str:
        """The folder of a checkpoint."""
        return str(self.root / name)

    def draft(self, name: str, token: str) -> str:
        """Hidden, and this save's alone: what else still writes cannot touch it."""
        return f".{name}.{token}"

    def roots(self, name: str) -> list[str]:
        """One: a save is renamed to it."""
        return [name]

    def publish(self, draft: str, name: str, marker: str, content: bytes) -> None:
        """Marker into the draft, everything to the disk, one rename, which replaces nothing."""
        self.write(f"{draft}/{marker}", content)
        for folder in patience.patiently(lambda: _folders(self.root / draft), self.root / draft):
            _sync(folder)
        target, aside = self.root / name, None
        while not _move_free(self.root / draft, target):
            aside = self.root / f".{name}.{uuid.uuid4().hex}"
            _move(target, aside)
            if patience.patiently((aside / marker).exists, aside):
                _move(aside, target)
                raise UserError(f"{target}: another job has published this checkpoint meanwhile")
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)  # hidden: the next start clears it away
        _sync(self.root)

    def withdraw(self, name: str, marker: str) -> None:
        """Unlink the marker."""
        path = self.root / name / marker
        patience.patiently(partial(path.unlink, missing_ok=True), path)

    def remove(self, name: str) -> None:
        """Delete the folder."""
        with contextlib.suppress(OSError):  # what stays has no marker: the next start clears it
            shutil.rmtree(self.root / name, ignore_errors=True)

    def files(self, name: str) -> list[str]:
        """All below the folder."""
        top = self.root / name

        def files() -> list[str]:
            found = [path for folder in _folders(top) for path in folder.iterdir()]
            return sorted(str(path.relative_to(top)) for path in found if path.is_file())

        return patience.patiently(files, top)

    def open(self, path: str) -> IO[bytes]:
        """For reading."""
        return patience.patiently(lambda: open(self.root / path, "rb"), self.root / path)

    def write(self, path: str, content: bytes) -> None:
        """Write beside, flush, sync, rename."""
        target = self.root / path
        patience.patiently(partial(target.parent.mkdir, parents=True, exist_ok=True), target)
        write_whole(target, content)

    def copy(self, source: str, path: str) -> None:
        """A second name for it, where the file system has that; else its content, synced."""
        target = self.root / path
        patience.patiently(partial(target.parent.mkdir, parents=True, exist_ok=True), target)

        def copy() -> None:
            try:
                os.link(source, target)
            except FileNotFoundError:
                raise
            except OSError:
                shutil.copyfile(source, target)
                with open(target, "rb") as copied:
                    os.fsync(copied.fileno())

        patience.patiently(copy, target)


class Store:
    """Checkpoints below a URL of a store that fsspec knows."""

    def __init__(self, url: str) -> None:
        """Raises UserError where fsspec knows no such store, or its package is missing."""
        import fsspec

        try:
            self._fs, self._path = fsspec.core.url_to_fs(url.rstrip("/"))
        except (ValueError, ImportError) as error:
            raise UserError(
                f"checkpoint.path: {url}: {error}; expected a folder or a URL that fsspec knows "
                "(s3:// needs the package s3fs, gs:// gcsfs)"
            ) from None
        self.url = url.rstrip("/")

    def names(self) -> list[str]:
        """First parts of all keys below the URL."""
        return [name for name in self._parts("") if name != CLAIM]

    def _parts(self, name: str) -> list[str]:
        """First parts of all keys below a name."""
        top = f"{self._path}/{name}".rstrip("/")

        def parts() -> list[str]:
            self._fs.invalidate_cache()
            try:
                return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in self._fs.ls(top, False)]
            except FileNotFoundError:
                return []

        return patience.patiently(parts, top)

    def _delete(self, path: str, recursive: bool = False) -> None:
        """What is there below the URL; nothing where it is gone already."""
        place = f"{self._path}/{path}"

        def delete() -> None:
            self._fs.invalidate_cache()
            if self._fs.exists(place):
                self._fs.rm(place, recursive=recursive)

        patience.patiently(delete, place)

    def where(self, name: str) -> str:
        """The URL of a checkpoint."""
        return f"{self.url}/{name}"

    def draft(self, name: str, token: str) -> str:
        """Below the checkpoint, and this save's alone: what else still writes, be it this very
        checkpoint, touches neither its files nor its marker."""
        return f"{name}/save_{token}"

    def roots(self, name: str) -> list[str]:
        """One a save; last the checkpoint itself, where saves of older versions lie."""
        saves = [entry for entry in self._parts(name) if entry.startswith("save_")]
        return [*(f"{name}/{save}" for save in sorted(saves, reverse=True)), name]

    def publish(self, draft: str, name: str, marker: str, content: bytes) -> None:
        """Write the marker."""
        self.write(f"{draft}/{marker}", content)

    def withdraw(self, name: str, marker: str) -> None:
        """Delete the marker, of whichever save."""
        for root in self.roots(name):
            self._delete(f"{root}/{marker}")

    def remove(self, name: str) -> None:
        """Delete all its objects."""
        self._delete(name, recursive=True)

    def files(self, name: str) -> list[str]:
        """All keys below it."""
        top = f"{self._path}/{name}/"

        def files() -> list[str]:
            self._fs.invalidate_cache()
            return sorted(key[key.index(top) + len(top) :] for key in self._fs.find(top))

        return patience.patiently(files, top)

    def open(self, path: str) -> IO[bytes]:
        """For reading."""
        place = f"{self._path}/{path}"
        return patience.patiently(lambda: self._fs.open(place, "rb"), place)

    def write(self, path: str, content: bytes) -> None:
        """One put: a store shows an object when it is whole and durable."""
        target = f"{self._path}/{path}"

        def put() -> None:
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._fs.pipe_file(target, content)

        patience.patiently(put, target)

    def copy(self, source: str, path: str) -> None:
        """Within the store, where it can do so."""
        target = f"{self._path}/{path}"

        def copy() -> None:
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._fs.cp_file(self._fs._strip_protocol(source), target)

        patience.patiently(copy, target)


def write_whole(target: Path, content: bytes) -> None:
    """Write a file so that it is whole on disk or not there: write, flush, sync, rename. Tried
    again while `patience` lasts, all of it: a sync that failed may have lost any part."""
    patience.patiently(lambda: _write_whole(target, content), target)


def _write_whole(target: Path, content: bytes) -> None:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _folders(top: Path) -> list[Path]:
    """`top` and all folders below it; none where it is not there. Raises OSError."""

    def fail(error: OSError) -> None:
        if not patience.missing(error):
            raise error

    return [Path(folder) for folder, _, _ in os.walk(top, onerror=fail)]


def _move(source: Path, target: Path) -> None:
    patience.patiently(_rename(source, target), target)


def _rename(source: Path, target: Path) -> Callable[[], None]:
    """A rename that may be tried again: one that was said to have failed may have been done."""
    failed = False

    def rename() -> None:
        nonlocal failed
        try:
            os.replace(source, target)
        except OSError as error:
            if failed and patience.missing(error) and target.exists() and not source.exists():
                return
            failed = True
            raise

    return rename


_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


def _move_free(source: Path, target: Path) -> bool:
    """Move a folder to a name; False where another folder has it."""

    def passing(error: OSError) -> bool:
        return patience.failing(error) and error.errno not in _OCCUPIED

    try:
        patience.patiently(_rename(source, target), target, passing)
    except OSError as error:
        if error.errno in _OCCUPIED:
            return False
        raise
    return True


def _sync(folder: Path) -> None:
    """Make names in a folder durable."""

    def sync() -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    patience.patiently(sync, folder)
