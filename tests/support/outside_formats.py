"""Formats of data that somebody has beside raysft: rows of Parquet, segments, and ratings.

None of them is known to the package; tests give them to `sources.register`.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raysft.data.example import Audio, Example
from raysft.data.sources import json_lines
from raysft.data.sources.base import (
    Chunk,
    Format,
    Item,
    Split,
    Survey,
    id_field,
    load_record,
    text_field,
)
from raysft.data.sources.records import OpenFile, Place
from raysft.errors import BadExample, UserError


class _Rows:
    """A Parquet file that is open. A row is a record: a line of JSON, and the clip's bytes behind
    it. starts: where each group of rows begins in the file, and where the last one ends."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        meta = self._file.metadata
        groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
        self.starts = [_start(group) for group in groups] + [_stop(group) for group in groups[-1:]]
        self.counts = [group.num_rows for group in groups]
        self._group: tuple[int, list[bytes]] = (-1, [])

    def records(self, group: int) -> list[bytes]:
        """Of a group, the last one asked for being kept."""
        if self._group[0] != group:
            rows = self._file.read_row_group(group).to_pylist()
            self._group = group, [_record(row) for row in rows]
        return self._group[1]

    def close(self) -> None:
        self._file.close()


def _start(group: pq.RowGroupMetaData) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    places = [(c.dictionary_page_offset, c.data_page_offset) for c in columns]
    return min(place for pair in places for place in pair if place is not None)


def _stop(group: pq.RowGroupMetaData) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    return _start(group) + sum(column.total_compressed_size for column in columns)


def _record(row: dict[str, object]) -> bytes:
    audio = row.pop("audio")
    assert isinstance(audio, bytes)
    return json.dumps(row, sort_keys=True).encode() + b"\n" + audio


class ParquetRows(Format):
    """One row an example: id, text, audio (the bytes of a clip). An item's offset is its group's
    place in the file and its number there."""

    name = "outside_parquet"
    describe = "Parquet with id, text and audio (bytes)"
    noun = "row"
    text = False

    def sniff(self, path: Path) -> bool:
        """By its marker."""
        return path.is_file() and json_lines.head(path).startswith(b"PAR1")

    def files(self, path: Path, split: Split) -> list[Path]:
        """The file itself, or all of a folder's."""
        return sorted(path.glob("*.parquet")) if path.is_dir() else [path]

    def survey(self, file: Path) -> Survey:
        """A chunk a group of rows."""
        try:
            rows = _Rows(file)
        except pa.ArrowInvalid as error:
            raise UserError(f"{file}: no Parquet: {error}") from error
        content, chunks, first = file.read_bytes(), [], 1
        for (start, stop), count in zip(pairwise(rows.starts), rows.counts, strict=True):
            chunks.append(
                Chunk(start, stop, first, hashlib.sha256(content[start:stop]).hexdigest())
            )
            first += count
        rows.close()
        return Survey(hashlib.sha256(content).hexdigest(), len(content), tuple(chunks))

    def items(self, file: Path, chunk: Chunk | None = None) -> Iterator[Item]:
        """The rows of a group, or of all."""
        rows, line = _Rows(file), 1
        for group, (start, count) in enumerate(zip(rows.starts, rows.counts)):
            if chunk is None or chunk.start == start:
                for number, raw in enumerate(rows.records(group)):
                    yield Item(start + number, len(raw), line + number, raw)
            line += count
        rows.close()

    def fetch(self, file: OpenFile, places: Sequence[Place]) -> Iterator[bytes]:
        """Rows by their places; none where the file is another by now."""
        for place in places:
            try:
                rows = file.kept(_Rows)
            except pa.ArrowInvalid:
                yield b""
                continue
            group = bisect_right(rows.starts, place.offset) - 1
            number = place.offset - rows.starts[group]
            there = 0 <= group < len(rows.counts) and number < rows.counts[group]
            yield rows.records(group)[number] if there else b""

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of one row."""
        head, _, content = raw.partition(b"\n")
        record = load_record(head)
        text, name = text_field(record, "text"), id_field(record, file, line)
        if not text:
            raise BadExample("field 'text' is empty")
        clip = Audio(f"{file}:{line}", bytes=content)
        return Example(name, task or "asr", (clip,), (text,), text=text)


def write_rows(path: Path, rows: list[tuple[str, str, bytes]], group: int = 4) -> Path:
    """A Parquet file of (id, text, audio), `group` rows a group."""
    names = ("id", "text", "audio")
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})
    pq.write_table(table, path, row_group_size=group, use_dictionary=False, compression="none")
    return path


class _Lines(json_lines.JsonLines):
    """What a format of JSON lines has to say itself is how it is called, and what a line is."""

    field = ""

    def sniff(self, path: Path) -> bool:
        """By the name of a field."""
        return path.is_file() and f'"{self.field}"'.encode() in json_lines.head(path)


class Segments(_Lines):
    """Lines of recording (a file's name), begin, end, channel and text."""

    name = "outside_segments"
    describe = "JSON lines with recording, begin, end, channel, text"
    field = "recording"

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of one line."""
        record = load_record(raw)
        path = str(file.parent / text_field(record, "recording"))
        begin, end = record.get("begin", 0.0), record.get("end")
        clip = Audio(path, None, begin, end, record.get("channel"))
        text = text_field(record, "text")
        return Example(id_field(record, file, line), "asr", (clip,), (text,), text=text)


class Ratings(_Lines):
    """Lines of heard (texts or names of clips, of which any may be asked about) and ratings."""

    name = "outside_ratings"
    describe = "JSON lines with ratings (dimension: number)"
    field = "ratings"

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of one line: a dimension is drawn, and the order in which the clips are
        heard; first of all the first dimension, in the order given."""
        record = load_record(raw)
        heard = [
            Audio(str(file.parent / name)) if name.endswith(".wav") else name
            for name in record["heard"]
        ]
        orders = [heard, heard[::-1]] if len(heard) > 1 else [heard]
        first, *others = (
            Example(
                id_field(record, file, line),
                "rate",
                tuple(order),
                (str(rating),),
                instruction=f"Rate its {dimension}.",
            )
            for dimension, rating in record["ratings"].items()
            for order in orders
        )
        return Example(
            first.id, "rate", first.input, first.output, first.instruction, variants=tuple(others)
        )
