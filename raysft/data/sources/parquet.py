"""Rows of Parquet and Arrow: data sets of Hugging Face, and tables of one's own.

    audio: {bytes, path} or a path or bytes, text: string        columns as table.py knows them

`columns: {latents: NAME}` instead of audio: a column of lists of frames, lists of numbers each, for
models that read latents (`model.patches.column`); of Parquet alone.

A source is a file, or a folder with *.parquet (of a data set of the hub: hf://datasets/NAME/data),
or one that `datasets` saved (data-*.arrow). Files named train-... are for training, test-... and
validation-... for evaluation, where there are such. Clips in the rows are read out of the file:
Parquet by groups of rows, Arrow by their place; shards that `jobs/prepare.py` writes by their place
too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources import json_lines
from raysft.data.sources.base import Split, folder_of
from raysft.data.sources.layout import Layout, below, fault
from raysft.data.sources.table import LATENTS, chosen, row_of
from raysft.errors import BadExample, UserError
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


_SPLITS = {"train": ("train",), "eval": ("test", "validation", "eval", "dev", "valid")}


class Parquet(Layout):
    """The format `parquet`."""

    name = "parquet"
    options = ("columns", "root")
    describe = "Parquet or Arrow with audio (bytes, or a path) and text; a data set of Hugging Face"
    text = False

    def sniff(self, path: Path) -> bool:
        """Whether it is such a file, or a folder that holds some."""
        if stores.is_dir(path):
            return bool(_files(path))
        return json_lines.head(path, 16).startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"))

    def files(self, path: Path, split: Split) -> list[Path]:
        """Of a folder those of the split, where their names say which they are of."""
        if not stores.is_dir(path):
            return [path]
        found = _files(path)
        if not found:
            raise UserError(f"{path} holds no .parquet and no .arrow file")
        of: dict[Path, str | None] = {file: _split(file, path) for file in found}
        if not any(of.values()):
            return found
        wanted = next((name for name in _SPLITS[split] if name in of.values()), None)
        if wanted is None:
            splits = ", ".join(sorted({name for name in of.values() if name}))
            raise UserError(
                f"{path} has no files for {split}; its splits: {splits}: name one's file"
            )
        return [file for file, name in of.items() if name == wanted]

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A row each."""
        arrow = json_lines.head(file, 4) != b"PAR1"
        yield from (_arrow if arrow else _parquet)(file, given)


def _files(path: Path) -> list[Path]:
    found = sorted(path.glob("*.parquet")) or sorted(path.glob("*/*.parquet"))
    return found or sorted(path.glob("*.arrow")) or sorted(path.glob("*/*.arrow"))


def _split(file: Path, top: Path) -> str | None:
    inner = below(str(file), str(top))
    names = [name for some in _SPLITS.values() for name in some]
    return next((n for n in names if re.match(rf"(?:data/)?{n}(?:[-_./]|$)", inner)), None)


def _parquet(file: Path, given: Source) -> Iterator[JsonObject]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = folder_of(file)
    try:
        with stores.random_access(file) as stream:
            whole = pq.ParquetFile(stream)
            columns = chosen(whole.schema_arrow.names, given, file)
            if LATENTS in columns:
                yield from _latents(whole, columns, file, given)
                return
            audio = whole.schema_arrow.field(columns["audio"]).type
            rest = [name for name in whole.schema_arrow.names if name != columns["audio"]]
            inner = _bytes_in(audio, columns["audio"])
            shown = rest + ([f"{columns['audio']}.path"] if inner.endswith(".bytes") else [])
            shown += [columns["audio"]] if not inner else []
            number = 0
            for group in range(whole.num_row_groups):
                rows = whole.read_row_group(group, columns=shown).to_pylist()
                if not rows:
                    rows = [{}] * whole.metadata.row_group(group).num_rows
                there = _there(whole, group, inner) if inner.endswith(".bytes") else None
                for row, record in enumerate(rows):
                    number += 1
                    held = bool(inner) and (there is None or there[row])
                    cell = [below(str(file), folder), group, row, inner] if held else None
                    yield _row(record, columns, file, number, given, {"cell": cell} if cell else {})
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: damaged, or no Parquet: {stores.damage(error)}") from None


def _latents(
    whole: pq.ParquetFile, columns: dict[str, str], file: Path, given: Source
) -> Iterator[JsonObject]:
    """Rows whose clips are latents: of a row the frames are counted, and their values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    name = columns[LATENTS]
    kind = whole.schema_arrow.field(name).type
    frames = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if frames is None or not any(is_one(frames) for is_one in lists):
        raise UserError(
            f"columns.{LATENTS}: column {name!r} of {file} is {kind}, expected lists of frames, "
            "lists of numbers each"
        )
    if not pa.types.is_floating(frames.value_type):
        raise UserError(
            f"columns.{LATENTS}: column {name!r} of {file} holds {frames.value_type}, no floats"
        )
    rest = [column for column in whole.schema_arrow.names if column != name]
    number = 0
    for group in range(whole.num_row_groups):
        rows = whole.read_row_group(group, columns=rest).to_pylist()
        cells = whole.read_row_group(group, columns=[name]).column(0)
        for row, (record, cell) in enumerate(zip(rows, cells, strict=True)):
            number += 1
            at = f"{file.name}: row {number}"
            record = {key: value for key, value in record.items() if value is not None}
            own = str(record.get(columns.get("id", ""), f"{file.stem}:{number}"))
            each = pc.list_value_length(cell.values).to_pylist() if cell.is_valid else []
            width = each[0] if each else None
            if not width or set(each) != {width}:
                why = "frames of several widths" if width else "no frames"
                yield fault(own, f"column {name!r} holds {why}", at)
                continue
            clip: JsonObject = {
                "path": f"{file.name}::{number}",
                "cell": [below(str(file), folder_of(file)), group, row, name],
                LATENTS: [len(cell.values), width],
            }
            try:
                yield row_of(record, own, columns, at, file, given.root, clip)
            except BadExample as error:
                yield fault(own, str(error), at)


def _there(whole: pq.ParquetFile, group: int, inner: str) -> list[bool] | None:
    """Of which rows of a group there are bytes; None: of all. Without them a path is the clip's."""
    import pyarrow.compute as pc

    meta = whole.metadata.row_group(group)
    columns = [meta.column(number) for number in range(meta.num_columns)]
    known = next((one.statistics for one in columns if one.path_in_schema == inner), None)
    if known is not None and known.has_null_count and known.null_count == 0:
        return None
    column = whole.read_row_group(group, columns=[inner]).column(0)
    return pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()


def _bytes_in(kind: pa.DataType, name: str) -> str:
    """The column of a clip's bytes; "": it holds paths. Raises UserError where it is neither."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type):
        return ""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{name}.bytes"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return name
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return ""
    raise UserError(f"columns.audio: column {name!r} is {kind}, expected a path, bytes, or both")


def _row(
    record: JsonObject,
    columns: dict[str, str],
    file: Path,
    number: int,
    given: Source,
    place: JsonObject,
) -> JsonObject:
    at = f"{file.name}: row {number}"
    record = {name: value for name, value in record.items() if value is not None}
    audio = record.get(columns["audio"])
    shown = audio.get("path") if isinstance(audio, dict) else None
    name = str(record.get(columns.get("id", ""), f"{file.stem}:{number}"))
    clip = None
    if isinstance(audio, dict) and not place:
        record[columns["audio"]] = shown
    if place:
        record[columns["audio"]] = shown
        clip = {"path": f"{file.name}::{shown or number}", **place}
    try:
        return row_of(record, name, columns, at, file, given.root, clip)
    except BadExample as error:
        return fault(name, str(error), at)


def _arrow(file: Path, given: Source) -> Iterator[JsonObject]:
    """Of an Arrow stream (as `datasets` writes) or file: a clip's bytes lie in it as they are."""
    import pyarrow as pa

    if stores.is_remote(file):
        raise UserError(f"{file}: Arrow is read from files of this system: copy it, or use Parquet")
    folder = folder_of(file)
    with pa.memory_map(str(file)) as mapped:
        whole = pa.py_buffer(mapped.read_buffer())
        mapped.seek(0)
        try:
            form = pa.ipc.open_file if json_lines.head(file, 6) == b"ARROW1" else pa.ipc.open_stream
            reader = form(mapped)
            batches = (
                (reader.get_batch(i) for i in range(reader.num_record_batches))
                if hasattr(reader, "num_record_batches")
                else reader
            )
            columns = chosen(reader.schema.names, given, file)
            if LATENTS in columns:
                raise UserError(f"columns.{LATENTS}: are read of Parquet: write {file} as that")
            inner = _bytes_in(reader.schema.field(columns["audio"]).type, columns["audio"])
            number = 0
            for batch in batches:
                places = _places(batch.column(columns["audio"]), inner, whole, file)
                rest = batch.drop_columns([columns["audio"]]).to_pylist()
                shown = _shown(batch.column(columns["audio"]), inner)
                for row in range(batch.num_rows):
                    number += 1
                    record = {**(rest[row] if rest else {}), columns["audio"]: shown[row]}
                    place = places[row] if inner else None
                    within = [below(str(file), folder), *place] if place else None
                    yield _row(
                        record, columns, file, number, given, {"within": within} if within else {}
                    )
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: damaged, or no Arrow: {stores.damage(error)}") from None


def _shown(column: pa.Array, inner: str) -> list[object]:
    import pyarrow.compute as pc

    if inner.endswith(".bytes"):
        if column.type.get_field_index("path") < 0:
            return [{}] * len(column)
        return [{"path": name} for name in pc.struct_field(column, "path").to_pylist()]
    return column.to_pylist() if not inner else [None] * len(column)


def _places(
    column: pa.Array, inner: str, whole: pa.Buffer, file: Path
) -> list[tuple[int, int] | None]:
    """(offset in the file, bytes) of each cell of a column of bytes; whole: the file's bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not inner:
        return []
    array = column.field("bytes") if inner.endswith(".bytes") else column
    _, ends, data = array.buffers()
    wide = pa.types.is_large_binary(array.type)
    offsets = np.frombuffer(ends, np.int64 if wide else np.int32)[array.offset :][: len(array) + 1]
    there = pc.struct_field(column, "bytes") if inner.endswith(".bytes") else column
    valid = there.is_valid().to_pylist()
    start = 0 if data is None else data.address - whole.address
    if data is not None and data.size and not 0 <= start <= whole.size - data.size:
        raise UserError(
            f"{file}: its buffers are compressed, and clips are read out of it as they lie there: "
            "write it without compression, or as Parquet"
        )
    return [
        (start + int(offsets[i]), int(offsets[i + 1] - offsets[i])) if valid[i] else None
        for i in range(len(array))
    ]


FORMAT = Parquet()
