"""Shards: Parquet with a clip in each row, as `jobs/prepare.py` writes it, and the preparations of
CosyVoice and Step-Audio.

    utt, wav (where it came from), audio_data (a file's bytes), text, spk, utt_embedding,
    spk_embedding, speech_token, seconds, tokens

A source is `data.list` (a shard's path a line), the folder that holds it, or one shard. Lengths are
read from the columns, and no audio is touched for them. In shards of raysft `audio_data` lies in
the file as it is, one value after the other, so that a clip is one read at a known place; in others
it is read by groups of rows. A shard that cannot be read any more costs its rows: their ids are in
the file .ids beside it. With `task: flow` in the entry a row is its clip, its tokens and its
embedding: that of the speaker, else that of the utterance.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources import json_lines
from raysft.data.sources.base import Split, clip_path, folder_of
from raysft.data.sources.layout import Layout, below, fault, listed
from raysft.data.sources.lines import lines
from raysft.data.sources.sounding import FLOW, TASK, told
from raysft.errors import BadExample, UserError
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    import pyarrow.parquet as pq


LIST = "data.list"
IDS = ".ids"
AUDIO = "audio_data"
_LIGHT = ("utt", "wav", "text", "spk", "task", "seconds", "samples", "sample_rate", "audio_bytes")
_VOICES = ("spk_embedding", "utt_embedding")
_FLOW = ("speech_token", *_VOICES)
_NEEDED = frozenset(["utt", "text", AUDIO])


class Shards(Layout):
    """The format `shards`."""

    name = "shards"
    rank = 0
    describe = "shards of prepare: data.list, its folder, or Parquet with utt, audio_data, text"
    text = False

    def sniff(self, path: Path) -> bool:
        """Whether it is a list of shards, a folder with one, or a shard."""
        if stores.is_dir(path):
            return stores.is_file(path / LIST) and self.sniff(path / LIST)
        head = json_lines.head(path, 1 << 12)
        if head.startswith(b"PAR1"):
            return _is_shard(path)
        first = next((line.strip() for line in head.split(b"\n") if line.strip()), b"")
        if not first.endswith((b".parquet", b".tar")) or first.startswith((b"{", b"[")):
            return False
        if first.endswith(b".parquet"):
            return True
        try:
            return _is_shard(_found(path, first.decode("utf-8"), 1))
        except (UserError, UnicodeDecodeError):
            return False

    def asked(self, given: Source) -> tuple[str, ...]:
        """Its tokens and embeddings, where they are for a flow decoder."""
        return (TASK,) if given.task == TASK else ()

    def files(self, path: Path, split: Split) -> list[Path]:
        """The shards."""
        if stores.is_dir(path):
            path = path / LIST
        if json_lines.head(path, 4) == b"PAR1":
            return [path]
        given = list(lines(path))
        return stores.at_once(lambda one: _found(path, one[1].strip(), one[0]), given)

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A row each."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = 0
        try:
            with stores.random_access(file) as stream:
                shard = pq.ParquetFile(stream)
                columns = (*_LIGHT, *_FLOW) if given.task == TASK else _LIGHT
                names = [name for name in columns if name in shard.schema_arrow.names]
                if missing := _NEEDED - set(shard.schema_arrow.names):
                    raise UserError(f"{file} has no column {', '.join(sorted(missing))}")
                for group in range(shard.num_row_groups):
                    rows = shard.read_row_group(group, columns=names).to_pylist()
                    places = _places(shard, group, rows, file)
                    for row, record in enumerate(rows):
                        number += 1
                        place = places[row] if places else None
                        found = _row(record, file, group, row, number, place)
                        if given.task == TASK:
                            voice = next((v for v in map(record.get, _VOICES) if v), None)
                            found[FLOW] = told(record.get("speech_token"), voice)
                        yield found
        except (pa.ArrowException, OSError) as error:
            yield from _lost(file, stores.damage(error), number)


def _row(
    record: JsonObject, file: Path, group: int, row: int, number: int, place: int | None
) -> JsonObject:
    folder = folder_of(file)
    path = below(str(file), folder)
    name = str(record["utt"] or f"{file.stem}:{number}")
    clip: JsonObject = {"path": f"{path}::{name}"}
    if place is None:
        clip["cell"] = [path, group, row, AUDIO]
    else:
        clip["within"] = [path, place, record["audio_bytes"]]
    if record.get("samples") and record.get("sample_rate"):
        clip["measured"] = [record["samples"], record["sample_rate"], 1]
    speaker, text = record.get("spk") or None, record.get("text") or ""
    at = f"{file.name}: row {number}"
    return listed(name, text, [clip], speaker=speaker, at=at, task=record.get("task"))


def _lost(file: Path, reason: str, read: int) -> Iterator[JsonObject]:
    """The rows behind the first `read`."""
    ids = file.with_name(file.stem + IDS)
    if not stores.is_file(ids):
        raise UserError(f"{file}: damaged, or no Parquet: {reason}") from None
    for _, name in islice(lines(ids), read, None):
        yield fault(name, f"its shard is damaged: {reason}", str(file))


def places(end: int, sizes: list[int]) -> list[int]:
    """Where values of these bytes begin that lie one after the other up to byte `end`, each behind
    its length (4 bytes): Parquet's PLAIN encoding of a required column, in one page."""
    at = end - sum(sizes) - 4 * len(sizes)
    found = []
    for size in sizes:
        found.append(at + 4)
        at += 4 + size
    return found


def _places(
    shard: pq.ParquetFile, group: int, rows: list[JsonObject], file: Path
) -> list[int] | None:
    """Where the clips of a group of rows lie in the file; None: they are not there as they are."""
    meta = shard.metadata.row_group(group)
    number = shard.schema_arrow.names.index(AUDIO)
    column = meta.column(number)
    sizes = [row.get("audio_bytes") for row in rows]
    if column.compression != "UNCOMPRESSED" or column.has_dictionary_page or None in sizes:
        return None
    if shard.schema.column(number).max_definition_level:
        return None
    end = column.data_page_offset + column.total_compressed_size
    found = places(end, [int(size) for size in sizes if size is not None])
    with stores.random_access(file) as stream:
        for row in {0, len(rows) - 1}:  # more pages than one: each has a head of its own
            stream.seek(found[row] - 4)
            if int.from_bytes(stream.read(4), "little") != sizes[row]:
                return None
    return found if found and found[0] - 4 > column.data_page_offset else None


def _is_shard(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with stores.random_access(path) as stream:
            return set(pq.read_schema(stream).names) >= _NEEDED
    except (pa.ArrowInvalid, OSError):
        return stores.is_file(path.with_name(path.stem + IDS))


def _found(source: Path, given: str, number: int) -> Path:
    """A shard of a list: where its line says, else beside the list (which may have moved)."""
    try:
        place = stores.at(clip_path(given, source))
    except BadExample as error:
        raise UserError(f"{source}:{number}: {error}") from None
    if stores.is_file(place):
        return place
    for beside in (source.parent / place.name, source.parent / place.parent.name / place.name):
        if stores.is_file(beside):
            return beside
    raise UserError(f"{source}:{number}: {place} does not exist")


FORMAT = Shards()
