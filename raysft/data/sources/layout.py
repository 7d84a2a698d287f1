"""Corpora whose examples lie in several files, or in files that are no text: listed once.

A layout says which records a file or folder holds, one by one, as plain JSON; they are written into
a file of lines below the index's folder (index/listing.py), which is then indexed and read as any
other. A record of a listing:

    {"listed": 1, "id": "a1", "text": "hello", "speaker": "s1", "audio": [CLIP, ...]}
    {..., "language": "de"}       only where examples are counted by it
    {"listed": 1, "id": "a1", "fault": "has no line in wav.scp", "at": "text:7"}

CLIP: a path, relative ones from the folder of what was listed; or an object with `path` and, where
they are meant, `start`, `stop` (seconds), `channel`, `seconds` (that it is said to have), `within`
[file, offset, size], or `cell` [file, row group, row, column]; `measured`: [samples, Hz, channels];
`latents`: [frames, values of each] where the cell holds latents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

from raysft import paths, stores
from raysft.config.schema import Source
from raysft.data.example import Audio, Cell, Example, Measured, Within
from raysft.data.sources import json_lines
from raysft.data.sources.base import (
    Item,
    Split,
    clip_path,
    folder_of,
    id_field,
    kind,
    load_record,
    text_field,
)
from raysft.data.sources.sounding import FLOW, of_listed
from raysft.data.sources.transcripts import transcript
from raysft.errors import BadExample
from raysft.json_types import Json, JsonObject

LISTED = "listed"
LANGUAGE = "language"  # of a listed record; of listings from before there was none
LANGUAGES = ("language", "lang", "locale")
_here: ContextVar[str | None] = ContextVar("here", default=None)


def here() -> str:
    """The folder the command runs in, also in a process that lists for it elsewhere."""
    return _here.get() or os.getcwd()


@contextmanager
def running_in(folder: str) -> Iterator[None]:
    """`folder` is where the command runs, for the length of a `with` block."""
    token = _here.set(folder)
    try:
        yield
    finally:
        _here.reset(token)


class Layout(json_lines.JsonLines):
    """What formats that are listed have in common; a source is a file of `files` each."""

    noun = "record"
    rank = 1
    options: tuple[str, ...] = ()
    """The keys of an entry beyond those that all have, which it reads."""
    tags: frozenset[str] = frozenset()
    """Texts that are none; see `transcript`."""
    by_split: bool = False
    """Whether what is evaluated is listed otherwise than what is trained on; see `of_split`."""
    from_here: bool = False
    """Whether relative paths of clips may begin at the folder that the command runs in."""

    def lists(self, given: Source) -> bool:
        """Whether a source of this entry has to be listed: else its files are lines that `parse`
        reads as they are."""
        return True

    def asked(self, given: Source) -> tuple[str, ...]:
        """What its records are made by of the entry, beside its `options`."""
        return ()

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """The records of one of `files`, in a fixed order. keep: a folder for files that it has to
        make. Raises UserError where its structure is broken, and OSError."""
        raise NotImplementedError

    def of_split(
        self, file: Path, given: Source, split: Split, keep: Path | None = None
    ) -> Iterator[JsonObject]:
        """`records`, of what is trained on or evaluated; the same where not `by_split`."""
        return self.records(file, given, keep)

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """The other files that its records come from: where none of these and itself has changed,
        it is not listed again. None: that cannot be told without listing."""
        return []

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of a listed record, or of a line of the file's own."""
        record = load_record(raw)
        if LISTED in record:
            return self._listed(record, file, line, task)
        return self.own(record, file, line, task)

    def line_of(self, item: Item) -> int | None:
        """Which line of the file that was listed a record is of; None: it lies in other files."""
        return None

    def own(self, record: JsonObject, file: Path, line: int, task: str | None) -> Example:
        """The example of a record as the file has it. Raises BadExample."""
        raise BadExample("is no record of a listing", "malformed record")

    def _listed(self, record: JsonObject, file: Path, line: int, task: str | None) -> Example:
        at = f" ({record['at']})" if record.get("at") else ""
        refuse_fault(record)
        speaker, text = record.get("speaker"), record.get("text")
        speaker = speaker if isinstance(speaker, str) else None
        text = text if isinstance(text, str) else ""
        try:
            name, language = id_field(record, file, line), language_of(record, (LANGUAGE,))
            clips = [_clip(clip, file) for clip in record.get("audio") or []]
            if FLOW in record:
                found = of_listed(name, clips, record[FLOW], task, speaker, text or None)
                return replace(found, language=language)
            own = task or record.get("task")
            return transcript(name, clips, text, own, speaker, self.tags, language)
        except BadExample as error:
            raise BadExample(f"{error}{at}", error.kind, record.get("id")) from None


def refuse_fault(record: JsonObject) -> None:
    """Raise BadExample where a listed record is no example."""
    if "fault" in record:
        at = f" ({record['at']})" if record.get("at") else ""
        raise BadExample(f"{record['fault']}{at}", "malformed record", record.get("id"))


def language_of(record: JsonObject, names: Sequence[str] = LANGUAGES) -> str | None:
    """The language that a record names in one of these fields; None: in none of them."""
    found = (record.get(name) for name in names)
    return next((value for value in found if isinstance(value, str) and value.strip()), None)


def listed(name: str | None, text: str, clips: Sequence[Json], **more: Json) -> JsonObject:
    """A record of a listing."""
    return {LISTED: 1, "id": name, "text": text, "audio": list(clips), **more}


def fault(name: str, reason: str, at: str) -> JsonObject:
    """A record that is no example. at: file and line, for people."""
    return {LISTED: 1, "id": name, "fault": reason, "at": at}


def inside(file: Path, member: str, place: Sequence[int], folder: str) -> JsonObject:
    """A clip that is `member` of `file`, at place (offset, bytes); folder: of what is listed."""
    path = below(str(file), folder)
    return {"path": f"{path}::{member}", "within": [path, *place]}


def below(path: str, folder: str) -> str:
    """`path` from `folder` on, where it lies below it: a corpus that moves is still the same."""
    start = f"{folder}/"
    return path[len(start) :] if path.startswith(start) else path


def below_all(folder: Path) -> list[Path]:
    """Every file below a folder, in a fixed order; links to folders are followed (each folder is
    gone through once)."""
    if stores.is_remote(folder):
        return stores.below(folder)
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders.sort()
        state = os.stat(place)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        found += [Path(place, name) for name in names]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise error  # a folder that may not be entered is no empty one


def _clip(clip: Json, file: Path) -> Audio:
    if isinstance(clip, str):
        return Audio(clip_path(clip, file))
    if not isinstance(clip, dict):
        raise BadExample(f"audio is {kind(clip)}, expected a path or an object", "malformed record")
    path, folder = text_field(clip, "path"), folder_of(file)
    held: Within | Cell | None = None
    try:
        if place := clip.get("within"):
            held = Within(paths.of_data(place[0], folder), int(place[1]), int(place[2]))
        elif place := clip.get("cell"):
            held = Cell(
                paths.of_data(place[0], folder), int(place[1]), int(place[2]), str(place[3])
            )
    except (TypeError, ValueError, IndexError, AttributeError):
        raise BadExample(
            f"audio lies in {place!r}, which is no place", "malformed record"
        ) from None
    shown = f"{folder}/{path}" if not path.startswith("/") else path
    return Audio(
        shown if held else clip_path(path, file),
        clip.get("seconds"),
        seconds(clip, "start") or 0.0,
        seconds(clip, "stop"),
        clip.get("channel"),
        held=held,
        measured=Measured(*clip["measured"]) if clip.get("measured") else None,
        latents=(*clip["latents"],) if clip.get("latents") else None,
    )


def seconds(record: JsonObject, name: str | None) -> float | None:
    """A field that is a time in seconds, where it is there. Raises BadExample."""
    value = record.get(name) if name else None
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise BadExample(
            f"field {name!r} is {value!r}, expected seconds", "malformed record"
        ) from None
