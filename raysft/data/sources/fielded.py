"""Dialects of JSON: a clip and its text a record, under the names that a toolkit gives them.

A file is a JSON list, {"data": [...]}, or an object a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from raysft import stores
from raysft.config.schema import Source
from raysft.data.example import Audio, Example
from raysft.data.sources.base import clip_path, default_id, id_field, kind, load_record
from raysft.data.sources.fields import refuse_placeholders, refuse_unread, stated_seconds
from raysft.data.sources.json_files import JsonFiles, first_records
from raysft.data.sources.layout import (
    LANGUAGE,
    LANGUAGES,
    Layout,
    fault,
    language_of,
    listed,
    seconds,
)
from raysft.data.sources.transcripts import transcript
from raysft.errors import BadExample
from raysft.json_types import JsonObject


class Fielded(JsonFiles, Layout):
    """A dialect; what each of its fields is called, the first that a record has being taken.

    told_by: fields that tell a file is of this dialect. start, stop: of a part, in seconds; length:
    of a part in seconds where it has a start, else what the clip is said to have. languages: that
    examples are counted by. harmless: other fields that change nothing.
    """

    noun = "item"
    options: tuple[str, ...] = ("root",)
    told_by: tuple[str, ...]
    audio: tuple[str, ...]
    said: tuple[str, ...]
    names: tuple[str, ...] = ("id",)
    speakers: tuple[str, ...] = ("speaker",)
    start: str | None = None
    stop: str | None = None
    length: str | None = None
    languages: tuple[str, ...] = LANGUAGES
    harmless: tuple[str, ...] = ()

    def lists(self, given: Source) -> bool:
        """Only where relative paths begin elsewhere: else lines are read as they are."""
        return given.root is not None

    def sniff(self, path: Path) -> bool:
        """Whether one of the first lines has its fields."""
        return not stores.is_dir(path) and any(map(self.tells, first_records(path)))

    def tells(self, record: JsonObject) -> bool:
        """Whether a record is of this dialect."""
        return all(name in record for name in self.told_by)

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """Its lines, their clips from `root` on."""
        assert given.root is not None
        for item in self.items(file):
            at = f"{file.name}:{item.line}"
            try:
                if item.raw is None:
                    raise BadExample(item.error or "")
                record = load_record(item.raw)
                name, clips, text, speaker = self.read(record, file, item.line, given.root)
            except BadExample as error:
                yield fault(default_id(file, item.line), str(error), at)
                continue
            more = {"speaker": speaker, "at": at, LANGUAGE: self.language(record)}
            yield listed(name, text, [told(clip) for clip in clips], **more)

    def own(self, record: JsonObject, file: Path, line: int, task: str | None) -> Example:
        """The example of a line."""
        name, clips, text, speaker = self.read(record, file, line)
        return transcript(name, clips, text, task, speaker, self.tags, self.language(record))

    def language(self, record: JsonObject) -> str | None:
        """That a line names."""
        return language_of(record, self.languages)

    def read(
        self, record: JsonObject, file: Path, line: int, root: str | None = None
    ) -> tuple[str, list[Audio], str, str | None]:
        """Id, clips, text and speaker of a line. Raises BadExample naming the field at fault."""
        text = _field(record, self.said)
        refuse_placeholders(text, _first(record, self.said))
        named = self.paths(record)
        field = _first(record, self.audio)
        own = {field, *self.said, *self.names, *self.speakers, *self.harmless}
        own |= {name for name in (self.start, self.stop, self.length) if name}
        refuse_unread(record, frozenset(own), clip=named[0])
        try:
            clips = [self._part(record, clip_path(path, file, root)) for path in named]
        except BadExample as error:
            raise BadExample(f"field {field!r}: {error}", error.kind) from None
        number = next((record[name] for name in self.names if name in record), None)
        name = id_field({"id": number}, file, line)
        speaker = next((record[name] for name in self.speakers if record.get(name)), None)
        return name, clips, text, None if speaker is None else str(speaker)

    def paths(self, record: JsonObject) -> list[str]:
        """Of its clips. Raises BadExample where there is none."""
        field = _first(record, self.audio)
        value = record.get(field)
        given = value if isinstance(value, list) else [value]
        found = [path for path in given if isinstance(path, str) and path.strip()]
        if not found or len(found) < len(given):
            raise BadExample(
                f"field {field!r} is {kind(value)}, expected the path of a clip (or a list of them)"
                if field in record
                else f"field {field!r} is missing; fields found: {', '.join(sorted(record))}",
                "malformed record",
            )
        return found

    def _part(self, record: JsonObject, path: str) -> Audio:
        start, stop, length = (
            seconds(record, name) for name in (self.start, self.stop, self.length)
        )
        if start is None and stop is None:
            said = record.get(self.length) if self.length else None
            return Audio(path, stated_seconds(said))
        if stop is None and length is not None:
            stop = (start or 0.0) + length
        return Audio(path, start=start or 0.0, stop=None if stop == -1 else stop)


def told(clip: Audio) -> JsonObject:
    """A clip as a listing has it."""
    known = {"path": clip.path, "seconds": clip.stated, "start": clip.start or None}
    known |= {"stop": clip.stop, "channel": clip.channel}
    return {name: value for name, value in known.items() if value is not None}


def _first(record: JsonObject, names: tuple[str, ...]) -> str:
    return next((name for name in names if name in record), names[0])


def _field(record: JsonObject, names: tuple[str, ...]) -> str:
    name = _first(record, names)
    if name not in record:
        raise BadExample(
            f"field {' or '.join(map(repr, names))} is missing; fields found: "
            f"{', '.join(sorted(record))}",
            "malformed record",
        )
    if not isinstance(record[name], str):
        raise BadExample(
            f"field {name!r} is {kind(record[name])}, expected a text", "malformed record"
        )
    return record[name]
