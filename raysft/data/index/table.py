"""The index as it lies on disk: columns that every node maps, and records read by their place.

Made by build.py, read by the plan (its columns) and the stream (`Index.examples`). A folder:

    <index_path>/<name>/{tokens,seconds,task,source,file,offset,size,line,crc,again,heard,
                         lang}.npy
                        rejected.jsonl   meta.json

Costs 49 bytes an example on disk, no memory but the pages in use; `examples` takes 20 to 30 us an
example of Ming-UniAudio, 0.2 ms one of 500 units in MoST JSON (parsing them).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raysft import patience
from raysft.data import names
from raysft.data import sources as formats
from raysft.data.encode.base import Measures
from raysft.data.example import Example, Quarantined
from raysft.data.index import part as parts
from raysft.data.index.part import Part
from raysft.data.names import Naming
from raysft.data.sources import ResolvedSource
from raysft.data.sources.base import Item, default_id, origin
from raysft.data.sources.records import OpenFile, Place, fetch
from raysft.errors import UserError
from raysft.json_types import JsonObject

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
    "again": "|u1",
    "heard": "<f4",
    "lang": "<i4",
}
_ADDED = {"again": "names", "heard": "heard", "lang": "langs"}
"""Columns that indexes of earlier versions lack, and what `meta.json` has where they are there."""
OPEN_FILES = 64  # files kept open


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


class Repeats(NamedTuple):
    """Records whose id another record has too: how many, and the first two that share one."""

    count: int  # type: ignore[assignment]  # hides that of tuples
    rows: tuple[int, int]


class Index:
    """A built index. Its columns have one entry an example, sources one after the other.

    tokens: int32 [N], positions in the model. seconds: float32 [N], of audio.
    task: int16 [N], counts in `tasks`. source: int16 [N], counts in `sources`.
    hash: of what is planned: which examples, how long, of which task. Names and weights of
        sources and the place of the data do not change it.
    described: of each source name, weight, format, task, and caps where it has any. files: in the
        order of their examples.
    encoder: fingerprint of what measured the lengths.

    repeats: of an index that was just built, ids that are there more than once.

    Examples are called as `names` says; by `called`, as a run calls them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_bytes())
        self.hash: str = meta["hash"]
        self.tasks: list[str] = meta["tasks"]
        self._langs: list[str] = meta.get("langs", [])
        self.sources = [IndexedSource(item["name"], item["weight"]) for item in meta["sources"]]
        self.described: list[JsonObject] = meta["sources"]
        self.encoder: str = meta["encoder"]
        self.files = [IndexedFile(*file) for file in meta["files"]]
        self._files = [(Path(file.path), file.source) for file in self.files]
        self._starts = list(accumulate((file.examples for file in self.files), initial=0))
        self._open: dict[int, OpenFile] = {}
        self._reading = threading.Lock()
        columns = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in _COLUMNS
            if name not in _ADDED or meta.get(_ADDED[name])
        }
        self.tokens: np.ndarray = columns["tokens"]
        self.seconds: np.ndarray = columns["seconds"]
        self.task: np.ndarray = columns["task"]
        self.source: np.ndarray = columns["source"]
        self._columns = columns
        self._naming = self.naming
        self._labels: tuple[list[str], frozenset[str]] | None = None
        self.repeats: Repeats | None = None

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

    def __reduce__(self) -> tuple[object, ...]:
        return _opened, (str(self.folder), self._naming)

    def called(self, naming: Naming | None) -> Index:
        """This index, its examples called by these labels of its files; None: by their ids, as
        runs called them that began before they were made unique."""
        if naming is not None and "again" not in self._columns:
            raise UserError(
                f"data.index_path: {self.folder} was written by an earlier version of raysft and "
                "does not know which ids are there twice; start the job again to rebuild it"
            )
        self._naming, self._labels = naming, None
        return self

    @property
    def heard(self) -> np.ndarray:
        """float32 [N], seconds of audio that the model's encoder computes for each example. Raises
        UserError where the index was written by an earlier version, which did not measure them."""
        if "heard" not in self._columns:
            raise UserError(
                f"data.audio_per_batch: {self.folder} was written by an earlier version of raysft "
                "and does not know what an encoder computes; start the job again to rebuild it"
            )
        return self._columns["heard"]

    @property
    def languages(self) -> tuple[list[str], np.ndarray]:
        """Languages by name ("": examples that name none), and int32 [N], which of them each
        example is in. Raises UserError where the index was written by an earlier version, which
        did not keep them."""
        if "lang" not in self._columns:
            raise UserError(
                f"data.temperature.by: lang: {self.folder} was written by an earlier version of "
                "raysft and does not know what language examples are in; start the job again to "
                "rebuild it"
            )
        return self._langs, self._columns["lang"]

    @property
    def place(self) -> tuple[str, int, Naming | None]:
        """What `generations.open_index` takes: its folder, examples, and what they are called."""
        return str(self.folder), len(self), self._naming

    @property
    def entries(self) -> list[names.Entry]:
        """Path and source of each file."""
        return [(file.path, self.sources[file.source].name) for file in self.files]

    @property
    def naming(self) -> Naming | None:
        """The labels of its files, for one that stands alone; None: it was written by an earlier
        version, and does not know which ids are there twice."""
        if "again" not in self._columns:
            return None
        return names.naming(self.entries, names.labels(self.entries))

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

    def where(self, row: int) -> str:
        """Data file and line (or number of the item, or of the record listed) of an example."""
        name, source = self._files[self._columns["file"][row]]
        if (file := origin(Path(name))) == Path(name):
            return f"{file}:{self._columns['line'][row]}"
        picked = {key: [int(self._columns[key][row])] for key in ("file", "offset", "size", "line")}
        ((_, raw),) = self._records(picked, [0])
        item = Item(picked["offset"][0], picked["size"][0], picked["line"][0], raw)
        line = formats.line_of(formats.get(self.described[source]["format"]), item)
        return f"{file}: record {picked['line'][0]}" if line is None else f"{file}:{line}"

    def examples(self, rows: np.ndarray, named: bool = True) -> list[Example]:
        """The examples of `rows`, in their order; records are read in the order of the files.

        named: under the names they have in this index; else under the ids in their records.
        Raises UserError if a file has changed since it was indexed, or goes on being away.
        """
        rows = np.asarray(rows, np.int64)
        picked: dict[str, list[int]] = {
            name: self._columns[name][rows].tolist()
            for name in ("file", "offset", "size", "line", "crc", "again")
            if name in self._columns
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
            if named:
                found[place] = self._called(located.example, file, picked, place)
        return [example for example in found if example is not None]

    def _called(
        self, example: Example, file: Path, picked: dict[str, list[int]], place: int
    ) -> Example:
        """The example under its name."""
        if self._naming is None:
            return example
        if self._labels is None:
            found = names.named([path.path for path in self.files], self._naming)
            self._labels = found, frozenset(found)
        labels, known = self._labels
        line, again = picked["line"][place], bool(picked["again"][place])
        where = f"{labels[picked['file'][place]]}:{line}"
        name = names.name_of(example.id, default_id(file, line), where, again, known)
        return example if name == example.id else replace(example, id=name)

    def _records(
        self, picked: dict[str, list[int]], order: list[int]
    ) -> Iterator[tuple[int, bytes]]:
        """(place, bytes) in `order`, which is that of the files."""
        for file, group in groupby(order, key=picked["file"].__getitem__):
            own = list(group)
            form = formats.get(self.described[self.files[file].source]["format"])
            places = [Place(picked["line"][i], picked["offset"][i], picked["size"][i]) for i in own]
            records = fetch(form, self._open_file(file), places, self._reading)
            yield from zip(own, records, strict=True)

    def _open_file(self, file: int) -> OpenFile:
        with self._reading:
            if file not in self._open:
                if len(self._open) >= OPEN_FILES:
                    self._open.pop(next(iter(self._open)))  # closed when nobody reads it any more
                self._open[file] = OpenFile(self._files[file][0])
            return self._open[file]


def _opened(folder: str, naming: Naming | None) -> Index:
    return Index.load(folder).called(naming)


def join(
    resolved: list[ResolvedSource],
    files: list[tuple[ResolvedSource, Path]],
    digests: list[str],
    found: list[Part],
    encoder: Measures,
    folder: Path,
) -> Index:
    """One folder of columns from all parts, named by what is in it."""
    places = {id(source): number for number, source in enumerate(resolved)}
    owners = [places[id(source)] for source, _ in files]
    tasks = sorted({task for part in found for task in part.tasks})
    langs, lang = _languages(found)
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
        "names": 1,
        "heard": 1,
        "tasks": tasks,
        "langs": langs,
        "lang": hashlib.sha256(lang.data).hexdigest(),
        "sources": [
            {"name": s.name, "weight": s.weight, "format": s.format, "task": s.task, **s.caps}
            for s in resolved
        ],
        "encoder": f"{encoder.fingerprint} at {encoder.sample_rate} Hz",
        "files": [
            list(IndexedFile(str(file), owner, digest, kept, len(part.rows)))
            for owner, digest, (_, file), kept, part in zip(owners, digests, files, hashes, found)
        ],
    }
    again, refused, repeats = _names(files, found)
    called = iter(refused)
    rejected = "".join(
        json.dumps(
            asdict(Quarantined(next(called), source.name, item.path, item.reason, item.kind))
        )
        + "\n"
        for (source, _), part in zip(files, found)
        for item in part.refused
    ).encode()
    text = json.dumps(meta, indent=1).encode()
    target = folder / hashlib.sha256(text + rejected).hexdigest()[:32]
    if not patience.known((target / "meta.json").exists, target):
        _write(target, text, rejected, tasks, owners, found, again, lang)
    index = Index.load(target)
    index.repeats = repeats
    return index


def _languages(found: list[Part]) -> tuple[list[str], np.ndarray]:
    """The languages of all parts' examples, by name; int32 [N], which of them each is in."""
    used = {part.langs[n] for part in found for n in np.unique(part.rows["lang"]).tolist()}
    langs = sorted(used)
    columns = [parts.renumber(part.langs, langs)[part.rows["lang"]] for part in found]
    return langs, np.concatenate([np.zeros(0, np.int32), *columns])


def _names(
    files: list[tuple[ResolvedSource, Path]], found: list[Part]
) -> tuple[np.ndarray, list[str], Repeats | None]:
    """Which examples, of all parts, have ids that others have too (bool); what the rejected items
    are called; and records that share ids."""
    labels = names.labels([(str(file), source.name) for source, file in files])
    known = frozenset(labels)
    items = [
        (item, default_id(file, item.line), f"{label}:{item.line}")
        for (_, file), label, part in zip(files, labels, found)
        for item in part.refused
    ]
    own = [names.hashed(item.id) if item.id != default else 0 for item, default, _ in items]
    hashes = [part.rows["name"] for part in found]
    again = names.repeated(np.concatenate([*hashes, np.array(own, np.uint64)]))
    rows = len(again) - len(items)
    refused = [
        names.name_of(item.id, default, place, bool(twice), known)
        for (item, default, place), twice in zip(items, again[rows:])
    ]
    return again[:rows], refused, _repeats(files, found, again[:rows])


def _repeats(
    files: list[tuple[ResolvedSource, Path]], found: list[Part], again: np.ndarray
) -> Repeats | None:
    """A record that two sources read is one record: no fault of the data."""
    rows = np.flatnonzero(again)
    if not len(rows):
        return None
    first = {file: number for number, (_, file) in reversed(list(enumerate(files)))}
    owner = np.repeat([first[file] for _, file in files], [len(part.rows) for part in found])[rows]
    hashes, offsets = (
        np.concatenate([part.rows[name] for part in found])[rows] for name in ("name", "offset")
    )
    order = np.lexsort((rows, offsets, owner, hashes))
    same = (np.diff(hashes[order]) == 0) & (np.diff(owner[order]) == 0)
    same &= np.diff(offsets[order]) == 0
    order = order[np.append(True, ~same)]  # a row of each record
    alike = np.diff(hashes[order]) == 0
    shared = np.append(alike, False) | np.append(False, alike)
    if not shared.any():
        return None
    mine = order[shared]
    one = mine[rows[mine].argmin()]
    both = np.sort(rows[mine][hashes[mine] == hashes[one]])[:2].tolist()
    return Repeats(int(shared.sum()), (both[0], both[1]))


def _write(
    target: Path,
    meta: bytes,
    rejected: bytes,
    tasks: list[str],
    owners: list[int],
    found: list[Part],
    again: np.ndarray,
    lang: np.ndarray,
) -> None:
    """Write beside, then rename: readers see a whole index or none."""
    count = sum(len(part.rows) for part in found)
    numbers = [parts.renumber(part.tasks, tasks) for part in found]
    starts = list(accumulate((len(part.rows) for part in found), initial=0))

    def column(name: str, number: int, part: Part) -> np.ndarray:
        if name == "source":
            return np.full(len(part.rows), owners[number], np.int16)
        if name == "file":
            return np.full(len(part.rows), number, np.int32)
        if name == "task":
            return numbers[number][part.rows["task"]]
        if name in ("again", "lang"):
            whole = again if name == "again" else lang
            return whole[starts[number] : starts[number + 1]]
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
