"""What every source format shares: the shape of an item, a chunk and a format.

First stage of sources -> index -> plan -> stream -> step -> checkpoint -> evaluate -> export.
A format says which files a path means, where the items of a file lie, and how the bytes of one
item become an `Example`. It never loads a file whole: `survey` passes over a file once to hash it
and to cut it into chunks of about `CHUNK_BYTES` that are then read in parallel; `fetch` gives the
bytes of items by their places.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from raysft import paths, stores
from raysft.config.schema import Source
from raysft.data.example import Example
from raysft.data.sources.json_errors import explain
from raysft.data.sources.records import OpenFile, Place, byte_ranges
from raysft.errors import BadExample, UserError
from raysft.json_types import Json, JsonObject

Split = Literal["train", "eval"]

CHUNK_BYTES = 1 << 20
"""Size of the byte ranges a file is cut into: some thousand items, about a second of work. They are
a little larger, and twice that at most: see `ends_chunk`."""

MAX_ITEM_BYTES = 64 << 20
"""Longest item: more is a file that is not what it seems, and would fill the memory."""

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole items in bytes [start, stop) of a file; `first` is the line or ordinal of the first.
    digest: of its bytes, from which what was measured of it is known again."""

    start: int
    stop: int
    first: int
    digest: str = field(default="", compare=False)


def chunk_digest(start: int) -> hashlib.blake2b:
    """What the digest of a chunk that begins at byte `start` begins with: the first chunk of a file
    may hold a byte order mark, and is none of the others."""
    return hashlib.blake2b(b"" if start else b"first", digest_size=16)


def ends_chunk(item: bytes, share: float) -> bool:
    """Whether a chunk that is large enough ends with this item (or line), by its last bytes.

    share: of a chunk that the item takes. One ends in a third of a chunk, so that most often it is
    the same one wherever the chunk began: cuts lie where they lay when something before them came
    or went."""
    return zlib.crc32(item[-ITEM_TAIL:]) < 3 * share * (1 << 32)


ITEM_TAIL = 4096  # bytes of an item that `ends_chunk` looks at


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over a file's bytes tells: its sha256, its size in bytes and its chunks."""

    digest: str
    size: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """The raw bytes of one item and where they lie.

    line: its line (JSON lines) or its ordinal in the file (JSON), both counted from 1.
    offset, size: of a text the bytes [offset, offset + size); of another file whatever `fetch`
        finds the item by, growing from item to item, and within its chunk's [start, stop): where
        a chunk is found elsewhere in a changed file, its items' offsets move as its start does.
    raw: all that `parse` needs, the same whenever it is read (its checksum is kept, and a change
        is refused), or None where `error` says why it was not read.
    """

    offset: int
    size: int
    line: int
    raw: bytes | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Located:
    """An item read: its example, or the reason it has none, and that reason's kind."""

    offset: int
    size: int
    line: int
    id: str
    example: Example | None
    error: str | None
    kind: str | None = None


class Format(Protocol):
    """A source format. A module of this package that has a `FORMAT` is one (see ming_jsonl.py), and
    what is given to `sources.register`. Items of a chunk are held together while they are
    measured: where they hold clips, chunks are to be short."""

    name: str
    describe: str
    """What it reads, in a few words: the list a user sees when no format matches."""
    noun: str
    """What an item is called in messages: line, item."""
    rank: int = 0
    """Of the formats that a file looks like, that of the least rank is taken, the first of equals.
    Those of other programs have 1, those that much looks like 2."""
    text: bool = True
    """Whether its files are text in UTF-8: others are refused then, with what they are."""

    def sniff(self, path: Path) -> bool:
        """Whether the content of this file or folder looks like this format (reads its head)."""

    def files(self, path: Path, split: Split) -> list[Path]:
        """The files `path` means, in a fixed order. Raises UserError where there is none."""

    def survey(self, file: Path) -> Survey:
        """Hash the file and cut it into chunks. Raises UserError where its structure is broken."""

    def items(self, file: Path, chunk: Chunk | None = None) -> Iterator[Item]:
        """The items of a chunk, or of the whole file, in order; memory is that of one item."""

    def fetch(self, file: OpenFile, places: Sequence[Place]) -> Iterator[bytes]:
        """`raw` of the items at `places`, which are in the order of their offsets; not to be called
        but by `records.fetch`. Here: ranges of bytes.

        An item that is not there any more has other bytes, or none (b""). Raises OSError where the
        storage fails, and is then called again for what is left.
        """
        return byte_ranges(file, places)

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example in one item's bytes; `task` overrides what the data says.

        Raises BadExample where it cannot be used.
        """


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """An entry of data.train or data.eval with its format decided and its files listed."""

    key: str
    name: str
    path: Path
    format: str
    task: str | None
    weight: float
    files: tuple[Path, ...]
    given: Source | None = None
    """The entry itself."""
    split: Split = "train"

    @property
    def caps(self) -> JsonObject:
        """What of it is seen in an epoch at most, by the keys that say so."""
        caps = {key: getattr(self.given, key, None) for key in ("max_examples", "max_hours")}
        return {key: cap for key, cap in caps.items() if cap is not None}


ORIGIN = "raysft-origin.json"
"""Beside a listing: what was listed. See index/listing.py."""


@functools.lru_cache(maxsize=4096)
def origin(file: Path) -> Path:
    """The file that a listing was made of, as paths in it and messages mean it; else itself."""
    try:
        note = json.loads((file.parent / ORIGIN).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return file
    return stores.at(note["origin"]) if note.get("listing") == file.name else file


@functools.lru_cache(maxsize=64)
def folder_of(file: Path) -> str:
    """Where relative paths in a data file begin; of an object its URL without the name."""
    return str(file.parent if stores.is_remote(file) else file.parent.absolute()).rstrip("/")


def clip_path(given: str, file: Path, root: str | None = None) -> str:
    """The path of a clip that a record of `file` names. root: where relative ones begin; None: at
    the file's folder. Raises BadExample (without the field's name)."""
    try:
        return paths.of_data(given, root or folder_of(file))
    except UserError as error:
        raise BadExample(str(error), "malformed record") from None


def default_id(file: Path, line: int) -> str:
    """The id of an item that has none of its own."""
    return f"{file.stem}:{line}"


def load_record(raw: bytes) -> JsonObject:
    """The JSON object in `raw` (utf-8). Raises BadExample where it is none."""
    text = ""
    try:
        text = raw.removeprefix(BOM).decode("utf-8")
        if text.startswith("\ufeff"):  # a second one
            json.loads(text)
        record = _DECODER.decode(text)
        if b"\\u" in raw:
            # A lone surrogate (half a character, written \ud83d) passes the JSON parser and
            # fails much later, in the tokenizer or when the ledger is written.
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadExample(
            f"not valid UTF-8: {error.reason} at byte {error.start}", "malformed record"
        ) from error
    except UnicodeEncodeError as error:
        raise BadExample(
            "holds half a surrogate pair (\\ud800 to \\udfff), not text", "malformed record"
        ) from error
    except json.JSONDecodeError as error:
        raise BadExample(f"not valid JSON: {explain(error, text)}", "malformed record") from error
    except (ValueError, RecursionError) as error:
        raise BadExample(f"not readable as JSON: {error}", "malformed record") from error
    if not isinstance(record, dict):
        raise BadExample(f"not a JSON object: found {kind(record)}", "malformed record")
    return record


def _once(pairs: list[tuple[str, Json]]) -> JsonObject:
    """An object; of a field that is given twice a parser would keep the last, in silence."""
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadExample(f"field {twice!r} is given twice", "malformed record")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_once)  # json.loads would make one a record


def kind(value: object) -> str:
    """What a JSON value is, as a user would call it."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")


def text_field(record: JsonObject, name: str) -> str:
    """A field that must be a text (it may be empty). Raises BadExample naming the field."""
    if name not in record:
        raise BadExample(
            f"field {name!r} is missing; fields found: {', '.join(sorted(record))}",
            "malformed record",
        )
    value = record[name]
    if not isinstance(value, str):
        raise BadExample(f"field {name!r} is {kind(value)}, expected a text", "malformed record")
    return value


def id_field(record: JsonObject, file: Path, line: int) -> str:
    """The record's `id` (text or number), else one made of the file's name and the line."""
    value = record.get("id")
    if value is None or value == "":
        return default_id(file, line)
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise BadExample(f"field 'id' is {kind(value)}, expected a text", "malformed record")
