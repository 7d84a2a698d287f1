"""Tables: CSV and TSV whose columns the entry names, and those of Common Voice and audio folders.

    data.train=[{path: train.tsv, columns: {audio: path, text: sentence, speaker: client_id}}]

`columns` says which column holds the clip's path and which its text, and may name `id`, `speaker`,
`language`, `start` and `stop` (seconds). Without it a column's name tells: audio, path, file_name,
wav; text, sentence, transcription, transcript. Common Voice's tables (client_id, path, sentence,
...; its clips in `clips/`) are known by their columns. Tabs part columns where the first line has
one, and quotes are text then; else commas do, and quotes are CSV's.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources import json_lines
from raysft.data.sources.base import BOM, clip_path, folder_of
from raysft.data.sources.fields import refuse_unread
from raysft.data.sources.layout import (
    LANGUAGE,
    LANGUAGES,
    Layout,
    below,
    fault,
    language_of,
    listed,
    seconds,
)
from raysft.data.sources.lines import decoded, lines
from raysft.errors import BadExample, UserError
from raysft.json_types import JsonObject

CLIPS = "clips"
AUDIO = ("audio", "path", "file_name", "wav", "audio_path", "audio_filepath", "file")
TEXT = ("text", "sentence", "transcription", "transcript", "txt")
SPEAKER = ("speaker", "speaker_id", "spk", "client_id")
ID = ("id", "utt", "utt_id", "key")
LATENTS = "latents"  # of `columns`: a column of Parquet instead of clips
_KNOWN = {"audio": AUDIO, "text": TEXT, "speaker": SPEAKER, "id": ID, LANGUAGE: LANGUAGES}


class Table(Layout):
    """The format `table`."""

    name = "table"
    rank = 2
    options = ("root", "columns")
    describe = "CSV or TSV with a first line of names: audio (path) and text (sentence), or columns"

    def sniff(self, path: Path) -> bool:
        """Whether its first line names a clip and a text."""
        if stores.is_dir(path) or path.suffix.lower().removesuffix(".gz") not in (
            ".csv",
            ".tsv",
            ".txt",
        ):
            return False
        try:
            names, _ = _names(path)
        except UserError:
            return False
        return bool(set(names) & set(AUDIO)) and bool(set(names) & set(TEXT))

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """Common Voice's folder of clips, which may have come."""
        clips = file.parent / CLIPS
        return [] if stores.is_remote(file) or not stores.is_dir(clips) else [clips]

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A row each."""
        names, mark = _names(file)
        columns = chosen(names, given, file)
        if LATENTS in columns:
            raise UserError(f"columns.{LATENTS}: are read of Parquet: write {file} as that")
        common_voice = "client_id" in names and "sentence" in names
        root = given.root
        if root is None and common_voice and stores.is_dir(file.parent / CLIPS):
            root = f"{folder_of(file)}/{CLIPS}"
        for at, row in _rows(file, mark):
            where = f"{file.name}:{at}"
            record: JsonObject = {n: value for n, value in zip(names, row) if value != ""}
            name = record.get(columns.get("id", ""))
            if name is None:
                path = PurePosixPath(str(record.get(columns["audio"], "")))
                name = path.stem if common_voice else ""
            try:
                if len(row) != len(names):
                    raise BadExample(f"has {len(row)} columns, and the first line {len(names)}")
                yield row_of(record, str(name), columns, where, file, root)
            except BadExample as error:
                yield fault(str(name or where), str(error), where)


def chosen(names: list[str], given: Source, file: Path) -> dict[str, str]:
    """Which column is the clip, the text, ... Raises UserError where one that is needed is not
    there."""
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{file} has two columns {twice[0]!r}: rename one")
    columns: dict[str, str] = {str(what): name for what, name in (given.columns or {}).items()}
    for what, known in _KNOWN.items():
        found = next((name for name in known if name in names), None)
        if what not in columns and found is not None:
            columns[what] = found
    if LATENTS in columns:
        columns.pop("audio", None)
    for what in (LATENTS if LATENTS in columns else "audio", "text"):
        if what not in columns:
            raise UserError(
                f"{file} has no column that is known to hold the {what} (columns: "
                f"{', '.join(names)}): say which with columns: {{{what}: NAME}}"
            )
    for what, name in columns.items():
        if name not in names:
            raise UserError(
                f"columns.{what}: {file} has no column {name!r}; its columns: {', '.join(names)}"
            )
    return columns


def row_of(
    record: JsonObject,
    name: str,
    columns: dict[str, str],
    at: str,
    file: Path,
    root: str | None = None,
    clip: JsonObject | None = None,
) -> JsonObject:
    """A row as a listing has it; clip: where its column is no path. Raises BadExample."""
    text = record.get(columns["text"])
    if not isinstance(text, str):
        raise BadExample(f"column {columns['text']!r} holds no text")
    read = frozenset(columns.values()) | {"sentence_id", "segment", "up_votes", "down_votes"}
    path = record.get(columns.get("audio", ""))
    refuse_unread(record, read, clip=path if isinstance(path, str) else None)
    if clip is None:
        if not isinstance(path, str) or not path.strip():
            raise BadExample(f"column {columns['audio']!r} holds no path")
        clip = {"path": below(clip_path(path, file, root), folder_of(file))}
    for what in ("start", "stop"):
        if (value := seconds(record, columns.get(what))) is not None:
            clip[what] = value
    speaker = record.get(columns.get("speaker", ""))
    more = {"speaker": None if speaker is None else str(speaker), "at": at}
    return listed(
        name, text, [clip], **more, language=language_of(record, (columns.get(LANGUAGE, ""),))
    )


def _names(file: Path) -> tuple[list[str], str]:
    """The names in its first line, and what parts columns."""
    head = json_lines.head(file).removeprefix(BOM).split(b"\n")[0]
    try:
        line = head.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:1 is not valid UTF-8 ({error.reason})") from None
    mark = "\t" if "\t" in line else ","
    try:
        names = line.split("\t") if mark == "\t" else next(csv.reader([line]), [])
    except csv.Error as error:
        raise UserError(f"{file}:1 is no line of names: {error}") from None
    return [name.strip() for name in names], mark


def _rows(file: Path, mark: str) -> Iterator[tuple[int, list[str]]]:
    """(line, values) of all rows but the first."""
    if mark == "\t":
        for number, line in lines(file):
            if number > 1:
                yield number, line.split("\t")
        return
    with stores.opened(file) as stream:
        reader = csv.reader(_texts(file, stream), strict=True)
        at = 0
        try:
            for row in reader:
                if at and row:
                    yield at + 1, row
                at = reader.line_num
        except csv.Error as error:
            raise UserError(
                f"{file}:{at + 1}: {error}: the quotes of its row do not close"
            ) from None


def _texts(file: Path, stream: BinaryIO) -> Iterator[str]:
    """Lines with their ends, which may stand inside of quotes."""
    for number, raw in enumerate(stream, 1):
        yield decoded(raw, file, number)


FORMAT = Table()
