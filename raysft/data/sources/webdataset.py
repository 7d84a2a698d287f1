"""Tar archives of clips and their texts: WebDataset's, WeNet's shards, Emilia's.

    a1.flac  a1.txt         a1.flac  a1.json  ({"text": "hello", "speaker": "s1"})

Members that follow each other and have one name up to its first dot (or, where there are several
clips, up to a clip's ending) are one record: a clip, and its text as `txt` (or lab, trn,
transcript), or in `json` under text, txt, transcript, transcription or sentence. Names that begin
with `.` or `__` are passed over, as WebDataset does. A source is an archive, a pattern
(a{000..127}.tar), a folder of archives, or a list of their paths, one a line. Clips are read out of
the archives by their place; each archive is read through once, for its headers and texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources import json_lines, tars
from raysft.data.sources.base import Split, clip_path, folder_of, load_record
from raysft.data.sources.fields import names_audio_file, refuse_placeholders, refuse_unread
from raysft.data.sources.layout import Layout, fault, inside, language_of, listed, seconds
from raysft.data.sources.lines import lines
from raysft.data.sources.tars import Member
from raysft.errors import BadExample, UserError
from raysft.json_types import JsonObject

TEXTS = ("txt", "lab", "trn", "transcript", "text")
SAID = ("text", "txt", "transcript", "transcription", "sentence")
READ = frozenset([*SAID, "id", "key", "__key__", "utt", "speaker", "spk", "speaker_id"])


class WebDataset(Layout):
    """The format `webdataset`."""

    name = "webdataset"
    describe = "tar archives (or a list of their paths) of a clip with txt or json each"
    text = False

    def sniff(self, path: Path) -> bool:
        """Whether it is an archive, a folder that holds some, or a list of their paths."""
        if stores.is_dir(path):
            return next(path.glob("*.tar"), None) is not None and not _is_shar(path)
        head = json_lines.head(path, 1 << 13)
        if tars.is_tar(head):
            return True
        first = head.split(b"\n")[:2]
        return bool(first[0].strip()) and all(
            line.strip().endswith(b".tar") and not line.lstrip().startswith((b"{", b"["))
            for line in first
            if line.strip()
        )

    def files(self, path: Path, split: Split) -> list[Path]:
        """The archives."""
        if stores.is_dir(path):
            return sorted(path.glob("*.tar"))
        if tars.is_tar(json_lines.head(path, 512)):
            return [path]
        given = [
            (number, one) for number, line in lines(path) for one in tars.expanded(line.strip())
        ]
        return stores.at_once(lambda one: archive(one[1], path, f"{path}:{one[0]}"), given)

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """The records of an archive."""
        members = (one for one in tars.members(file) if not _hidden(one.name))
        for _, group in groupby(members, lambda member: _key(member.name)):
            for key, some in _records(list(group)):
                try:
                    yield self._record(file, key, some)
                except BadExample as error:
                    yield fault(key, str(error), f"{file.name}::{some[0].name}")

    def _record(self, file: Path, key: str, members: list[Member]) -> JsonObject:
        clips = [member for member in members if names_audio_file(member.name)]
        if not clips:
            names = ", ".join(member.name for member in members[:4])
            raise BadExample(
                f"no clip among {names}: what belongs to it has to lie beside it in the archive "
                "(tar --sort=name)"
            )
        if len(clips) > 1:
            raise BadExample(f"{len(clips)} clips of one name: {clips[0].name}, {clips[1].name}")
        others: dict[str, Member] = {}
        for member in members:
            start, ending = f"{key}.", member.name[len(key) + 1 :].lower()
            if member is clips[0] or not member.name.startswith(start):
                continue
            if others.setdefault(ending, member) is not member:
                raise BadExample(f"{member.name} is in it twice")
        text = next((_text(file, others[end]) for end in TEXTS if end in others), None)
        record: JsonObject = {}
        if "json" in others:
            record = load_record(tars.read(file, others["json"]))
            refuse_unread(record, READ, clip=clips[0].name)
            said = next((record[name] for name in SAID if isinstance(record.get(name), str)), None)
            if text is not None and said is not None and text != said.strip():
                raise BadExample(f"its txt says {text[:40]!r}, its json {said[:40]!r}")
            text = said if text is None else text
        if text is None:
            found = ", ".join(member.name for member in members)
            raise BadExample(
                f"no text: expected {key}.txt or {key}.json with text beside it in the archive; "
                f"found {found}"
            )
        refuse_placeholders(text, "text")
        clip = inside(file, clips[0].name, clips[0][1:], folder_of(file))
        if (stated := seconds(record, "duration")) is not None:
            clip["seconds"] = stated
        speaker = next((record[n] for n in ("speaker", "spk", "speaker_id") if record.get(n)), None)
        name = next((record[n] for n in ("id", "utt") if record.get(n)), PurePosixPath(key).name)
        more = {"speaker": None if speaker is None else str(speaker)}
        return listed(str(name), text, [clip], **more, language=language_of(record))


def archive(given: str, file: Path, where: str) -> Path:
    """An archive that `file` names, which is there. Raises UserError, beginning with `where`."""
    try:
        place = stores.at(clip_path(given, file))
    except BadExample as error:
        raise UserError(f"{where}: {error}") from None
    if not stores.is_file(place):
        raise UserError(f"{where}: {place} does not exist")
    return place


def _is_shar(path: Path) -> bool:
    return next(path.glob("cuts.*.jsonl*"), None) is not None


def _hidden(name: str) -> bool:
    """What no program reads as data: .DS_Store, ._a1.flac, __meta__.json."""
    return PurePosixPath(name).name.startswith((".", "__"))


def _key(name: str) -> str:
    """Up to the first dot of its last part, as WebDataset has it."""
    folder, bar, last = name.rpartition("/")
    return f"{folder}{bar}{last.partition('.')[0]}"


def _records(members: list[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Members of one `_key` as records. WeNet's keys may hold dots: of several clips each is a
    record, with what has its name up to its ending."""
    clips = [one.name for one in members if names_audio_file(one.name)]
    stems = [name[: name.rindex(".")] for name in clips]
    if len(clips) == 1:
        beside = any(one.name.startswith(f"{stems[0]}.") for one in members if one.name != clips[0])
        yield (stems[0] if beside else _key(clips[0])), members
        return

    def stem(member: Member) -> str:
        whose = [one for one in stems if member.name.startswith(f"{one}.")]
        return max(whose, key=len, default=_key(member.name))

    for key, some in groupby(members, stem):
        yield key, list(some)


def _text(file: Path, member: Member) -> str:
    try:
        return tars.read(file, member).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadExample(
            f"{member.name} is not valid UTF-8: {error.reason} at byte {error.start}"
        ) from None


FORMAT = WebDataset()
