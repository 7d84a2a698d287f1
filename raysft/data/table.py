"""The index as it lies on disk: columns that every node maps, and records read by their place.

Made by index.py, read by the plan (its columns) and the stream (`Index.examples`). A folder:

    <index_path>/<name>/{tokens,seconds,task,source,file,offset,size,line,crc}.npy
                        rejected.jsonl   meta.json

Costs 40 bytes an example on disk, no memory but the pages in use; `examples` takes 20 to 30 us an
example of Ming-UniAudio, 0.2 ms one of 500 units in MoST JSON (parsing them).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raysft import patience
from raysft.data import part as parts
from raysft.data import sources as formats
from raysft.data.encode import Encoder
from raysft.data.example import Example, Quarantined
from raysft.data.part import Part
from raysft.data.sources import ResolvedSource
from raysft.data.sources.base import Item
from raysft.errors import UserError

_COLUMNS = {
    "tokens": "<i4",
    "seconds": "<f4",
    "task": "<i2",
    "source": "<i2",
    "file": "<i4",
    "offset": "<i8",
    "size": "<i4",
    "line": "<i8",
    "crc": "<u4",
}
_GAP = 1 << 16  # bytes between two records below which one read fetches both
_SPAN = 8 << 20  # bytes of one read
_HANDLES = 64  # files kept open


class IndexedSource(NamedTuple):
    """A source as metrics and the plan know it."""

    name: str
    weight: float


class IndexedFile(NamedTuple):
    """A data file as it was indexed.

    source: counts in `sources`. digest: sha256 of its bytes. part: hash of what its examples came
    to (which can be used, how long they are). examples: how many.
    """

    path: str
    source: int
    digest: str
    part: str
    examples: int


class Index:
    """A built index. Its columns have one entry an example, sources one after the other.

    tokens: int32 [N], positions in the model. seconds: float32 [N], of audio.
    task: int16 [N], counts in `tasks`. source: int16 [N], counts in `sources`.
    hash: of what is planned: which examples, how long, of which task. Names and weights of
        sources and the place of the data do not change it.
    described: of each source name, weight, format and task. files: in the order of their examples.
    encoder: fingerprint of what measured the lengths.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_bytes())
        self.hash: str = meta["hash"]
        self.tasks: list[str] = meta["tasks"]
        self.sources = [IndexedSource(item["name"], item["weight"]) for item in meta["sources"]]
        self.described: list[dict[str, Any]] = meta["sources"]
        self.encoder: str = meta["encoder"]
        self.files = [IndexedFile(*file) for file in meta["files"]]
        self._files = [(Path(file.path), file.source) for file in self.files]
        self._starts = list(accumulate((file.examples for file in self.files), initial=0))
        self._handles: dict[int, int] = {}
        self._reading = threading.Lock()
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
        self.tokens: np.ndarray = columns["tokens"]
        self.seconds: np.ndarray = columns["seconds"]
        self.task: np.ndarray = columns["task"]
        self.source: np.ndarray = columns["source"]
        self._columns = columns

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """Open the index in `folder`. Raises UserError if there is none of this version."""
        folder = Path(folder)
        try:
            meta = patience.patiently((folder / "meta.json").read_bytes, folder, patience.momentary)
            version = json.loads(meta)["version"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"data.index_path: {folder} holds no index ({error})") from error
        if version != parts.VERSION:
            raise UserError(
                f"data.index_path: {folder} was written by another version of raysft (index "
                f"version {version}, expected {parts.VERSION}); start the job again to rebuild it"
            )
        return patience.known(lambda: cls(folder), folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return Index.load, (str(self.folder),)

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def rejected(self) -> list[Quarantined]:
        """Items that could not be indexed, by source, file and line."""
        path = self.folder / "rejected.jsonl"
        lines = patience.known(path.read_bytes, path).splitlines()
        try:
            return [Quarantined(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"data.index_path: {path} is damaged ({error}); delete its folder, and it is made "
                "again"
            ) from error

    def source_name(self, row: int) -> str:
        """Name of the source an example is from."""
        return self.sources[self.source[row]].name

    def rows(self, number: int) -> slice:
        """The rows of file `number`."""
        return slice(self._starts[number], self._starts[number + 1])

    def records(self, number: int) -> np.ndarray:
        """Of the examples of file `number`, in order: int64 [examples, 3] of byte offset, bytes
        and checksum of the record. What was only appended to a file leaves the others as they are.
        """
        mine = self.rows(number)
        columns = [self._columns[name][mine] for name in ("offset", "size", "crc")]
        return np.stack(columns, axis=1).astype(np.int64)

    def ids(self, rows: np.ndarray) -> list[str]:
        """Ids of examples, in the order of `rows` (reads their records)."""
        return [example.id for example in self.examples(rows)]

    def examples(self, rows: np.ndarray) -> list[Example]:
        """The examples of `rows`, in their order; records are read in the order of the files.

        Raises UserError if a file has changed since it was indexed, or goes on being away.
        """
        rows = np.asarray(rows, np.int64)
        picked = {
            name: self._columns[name][rows].tolist()
            for name in ("file", "offset", "size", "line", "crc")
        }
        order = np.lexsort((picked["offset"], picked["file"])).tolist() if len(rows) else []
        found: list[Example | None] = [None] * len(rows)
        for place, raw in self._records(picked, order):
            file, source = self._files[picked["file"][place]]
            line = picked["line"][place]
            if zlib.crc32(raw) != picked["crc"][place]:
                raise UserError(
                    f"{file} has changed since it was indexed (item {line}); a run keeps to the "
                    "data it was started with: restore the file, or start a run of another name"
                )
            form = formats.get(self.described[source]["format"])
            item = Item(picked["offset"][place], picked["size"][place], line, raw)
            located = formats.read(form, item, file, self.described[source]["task"])
            assert located.example is not None, located.error  # these bytes were parsed before
            found[place] = located.example
        return [example for example in found if example is not None]

    def _records(
        self, picked: dict[str, list[int]], order: list[int]
    ) -> Iterator[tuple[int, bytes]]:
        """(place, bytes) in `order`; records near each other in one read."""
        files, offsets, sizes = picked["file"], picked["offset"], picked["size"]
        first = 0
        while first < len(order):
            file, start = files[order[first]], offsets[order[first]]
            stop = start + sizes[order[first]]
            last = first + 1
            while (
                last < len(order)
                and files[order[last]] == file
                and offsets[order[last]] - stop < _GAP
                and offsets[order[last]] + sizes[order[last]] - start <= _SPAN
            ):
                stop = max(stop, offsets[order[last]] + sizes[order[last]])
                last += 1
            with self._reading:
                read = partial(self._read, file, start, stop - start)
                data = patience.known(read, self._files[file][0])
            for place in order[first:last]:
                at = offsets[place] - start
                yield place, data[at : at + sizes[place]]
            first = last

    def _read(self, file: int, start: int, count: int) -> bytes:
        """Fewer bytes only where the file has become shorter. Raises OSError."""
        handle = self._handle(file)
        try:
            data = os.pread(handle, count, start)
            if len(data) < count and os.fstat(handle).st_size >= start + count:
                raise OSError(errno.EIO, f"{len(data)} of {count} bytes read")
        except OSError:
            os.close(self._handles.pop(file))  # a stale one stays so: open the file anew
            raise
        return data

    def _handle(self, file: int) -> int:
        if file not in self._handles:
            if len(self._handles) >= _HANDLES:
                os.close(self._handles.pop(next(iter(self._handles))))
            self._handles[file] = os.open(self._files[file][0], os.O_RDONLY)
        return self._handles[file]


def join(
    resolved: list[ResolvedSource],
    files: list[tuple[ResolvedSource, Path]],
    digests: list[str],
    found: list[Part],
    encoder: Encoder,
    folder: Path,
) -> Index:
    """One folder of columns from all parts, named by what is in it."""
    places = {id(source): number for number, source in enumerate(resolved)}
    owners = [places[id(source)] for source, _ in files]
    tasks = sorted({task for part in found for task in part.tasks})
    hashes = [part.hash() for part in found]
    facts = [
        [owner, digest, source.format, source.task, file.stem, part]
        for owner, digest, (source, file), part in zip(owners, digests, files, hashes)
    ]
    content = hashlib.sha256(
        json.dumps([parts.VERSION, encoder.fingerprint, encoder.sample_rate, facts]).encode()
    )
    meta = {
        "version": parts.VERSION,
        "hash": content.hexdigest(),
        "examples": sum(len(part.rows) for part in found),
        "tasks": tasks,
        "sources": [
            {"name": s.name, "weight": s.weight, "format": s.format, "task": s.task}
            for s in resolved
        ],
        "encoder": f"{encoder.fingerprint} at {encoder.sample_rate} Hz",
        "files": [
            list(IndexedFile(str(file), owner, digest, kept, len(part.rows)))
            for owner, digest, (_, file), kept, part in zip(owners, digests, files, hashes, found)
        ],
    }
    rejected = "".join(
        json.dumps(asdict(Quarantined(item.id, source.name, item.path, item.reason))) + "\n"
        for (source, _), part in zip(files, found)
        for item in part.rejected
    ).encode()
    text = json.dumps(meta, indent=1).encode()
    target = folder / hashlib.sha256(text + rejected).hexdigest()[:32]
    if not patience.known((target / "meta.json").exists, target):
        _write(target, text, rejected, tasks, owners, found)
    return Index.load(target)


def _write(
    target: Path,
    meta: bytes,
    rejected: bytes,
    tasks: list[str],
    owners: list[int],
    found: list[Part],
) -> None:
    """Write beside, then rename: readers see a whole index or none."""
    count = sum(len(part.rows) for part in found)
    numbers = [parts.renumber(part.tasks, tasks) for part in found]

    def column(name: str, number: int, part: Part) -> np.ndarray:
        if name == "source":
            return np.full(len(part.rows), owners[number], np.int16)
        if name == "file":
            return np.full(len(part.rows), number, np.int32)
        if name == "task":
            return numbers[number][part.rows["task"]]
        return part.rows[name]

    def write() -> None:
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
        try:
            for name, dtype in _COLUMNS.items():
                # Plain writes, not a memory map: a full disk is then an error, not a dead process.
                with open(temporary / f"{name}.npy", "wb") as stream:
                    shape = {"descr": dtype, "fortran_order": False, "shape": (count,)}
                    np.lib.format.write_array_header_1_0(stream, shape)
                    for number, part in enumerate(found):
                        values = np.ascontiguousarray(column(name, number, part), dtype)
                        stream.write(values.data)
                    stream.flush()
                    os.fsync(stream.fileno())
            for name, content in (("rejected.jsonl", rejected), ("meta.json", meta)):
                with open(temporary / name, "wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            try:
                os.rename(temporary, target)
            except OSError:
                # Another job wrote the same index meanwhile: its name is a hash of its content.
                if not (target / "meta.json").exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    with parts.writing(target.parent):
        patience.patiently(write, target)
