"""lhotse's cuts (a manifest of JSON lines) and Shar (a folder of cuts.*.jsonl.gz and archives).

    {"id": "c1", "start": 1.5, "duration": 2.0, "channel": 0, "recording": {...},
     "supervisions": [{"text": "hello", "speaker": "s1"}], "type": "MonoCut"}

A cut is one example: its part of the recording, and the texts of its supervisions, by their time.
Sources of recordings are files or URLs; relative ones begin at the folder the command runs in, as
lhotse's own do, or at `root`. Read here is what needs no lhotse; cuts that are mixed, padded, of
features alone, or of recordings that are to be transformed are refused: lhotse writes those as
clips (`CutSet.save_audios`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources import json_lines, tars
from raysft.data.sources.base import (
    Split,
    clip_path,
    default_id,
    folder_of,
    load_record,
    text_field,
)
from raysft.data.sources.fields import refuse_unread
from raysft.data.sources.json_files import first_records
from raysft.data.sources.layout import (
    LANGUAGE,
    Layout,
    below,
    fault,
    here,
    inside,
    language_of,
    listed,
    seconds,
)
from raysft.errors import BadExample, UserError
from raysft.json_types import JsonObject

_CUT = frozenset(
    [
        "id",
        "start",
        "duration",
        "channel",
        "supervisions",
        "recording",
        "custom",
        "type",
        "features",
    ]
)
_SUPERVISION = frozenset(
    [
        "id",
        "recording_id",
        "start",
        "duration",
        "channel",
        "text",
        "language",
        "speaker",
        "gender",
        "custom",
        "alignment",
    ]
)

BEYOND = 0.1  # seconds that a supervision may reach beyond its cut


class Lhotse(Layout):
    """The format `lhotse`."""

    name = "lhotse"
    options = ("root",)
    from_here = True
    describe = "lhotse cuts (JSON lines with recording and supervisions), or a Shar folder"

    def sniff(self, path: Path) -> bool:
        """Whether it is a folder of Shar, or one of the first lines is a cut."""
        if stores.is_dir(path):
            return next(path.glob("cuts.*.jsonl*"), None) is not None
        return any(
            "supervisions" in record or record.get("type") in ("MixedCut", "PaddingCut")
            for record in first_records(path)
        )

    def files(self, path: Path, split: Split) -> list[Path]:
        """The manifests."""
        if not stores.is_dir(path):
            return [path]
        found = sorted(path.glob("cuts.*.jsonl*"))
        for file in found:
            if not stores.is_file(_archive(file)):
                raise UserError(f"{path} has {file.name} and no {_archive(file).name}")
        return found

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """Of Shar the archive of recordings."""
        return [_archive(file)] if _is_shar(file) else []

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A cut each."""
        members = _members(_archive(file)) if _is_shar(file) else None
        root = given.root or (folder_of(file) if stores.is_remote(file) else here())
        for item in json_lines.items(file):
            at = f"{file.name}:{item.line}"
            name = default_id(file, item.line)
            try:
                if item.raw is None:
                    raise BadExample(item.error or "")
                cut = load_record(item.raw)
                name = str(cut.get("id") or name)
                text, speaker, language = _said(cut)
                if members is None:
                    clip = _of_recording(cut, root, file)
                elif members.get(name):
                    archive, member = _archive(file), members[name].popleft()
                    clip = inside(archive, member.name, member[1:], folder_of(file))
                    clip |= _part(cut, _recording(cut))
                else:
                    raise BadExample(f"{name} is not in {_archive(file).name}")
            except BadExample as error:
                yield fault(name, str(error), at)
                continue
            yield listed(name, text, [clip], speaker=speaker, at=at, language=language)


def _is_shar(file: Path) -> bool:
    return file.name.startswith("cuts.") and stores.is_file(_archive(file))


def _archive(file: Path) -> Path:
    """cuts.000001.jsonl.gz -> recording.000001.tar."""
    number = file.name.split(".")[1] if file.name.count(".") > 1 else ""
    return file.with_name(f"recording.{number}.tar")


def _members(archive: Path) -> dict[str, deque[tars.Member]]:
    """The recordings of an archive by their cut's id, in their order: several cuts may have one."""
    found: dict[str, deque[tars.Member]] = {}
    for member in tars.members(archive):
        path = PurePosixPath(member.name)
        if path.suffix not in (".json", ".nometa", ".nodata"):
            found.setdefault(member.name.removesuffix(path.suffix), deque()).append(member)
    return found


def _said(cut: JsonObject) -> tuple[str, str | None, str | None]:
    """Text, speaker and language of a cut. Raises BadExample where it is no plain one."""
    kind = cut.get("type", "MonoCut")
    if kind not in ("MonoCut", "MultiCut"):
        raise BadExample(f"is a {kind}: MonoCut and MultiCut are read; write its audio anew")
    refuse_unread(cut, _CUT)
    custom = cut.get("custom")
    if isinstance(custom, dict):
        refuse_unread(custom, frozenset(["texts", "shar_origin", "shar_epoch", "shard_origin"]))
    given = cut.get("supervisions") or []
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise BadExample("field 'supervisions' is no list of objects")
    supervisions = sorted(given, key=lambda one: seconds(one, "start") or 0.0)
    if not supervisions:
        raise BadExample("has no supervision, which holds its text")
    texts: list[str] = []
    end = -math.inf
    length = seconds(cut, "duration")
    for one in supervisions:
        refuse_unread(one, _SUPERVISION)
        start = seconds(one, "start") or 0.0
        if start < end - 0.01:
            raise BadExample(
                "has supervisions that overlap: cut it to one each (trim_to_supervisions)"
            )
        end = start + (seconds(one, "duration") or 0.0)
        if start < -BEYOND or (length is not None and end > length + BEYOND):
            raise BadExample(
                f"has a supervision from {start:g} to {end:g} s, of which not all is heard: cut it "
                "at its supervisions (trim_to_supervisions)"
            )
        text = one.get("text")
        more = one.get("custom")
        if text is None and isinstance(more, dict) and more.get("texts"):
            text = more["texts"][0]  # LibriHeavy's: the transcript with case and punctuation first
        if not isinstance(text, str):
            raise BadExample("has a supervision without text")
        texts.append(text.strip())
    speakers = {one.get("speaker") for one in supervisions}
    speaker = speakers.pop() if len(speakers) == 1 else None
    named = {language_of(one, (LANGUAGE,)) for one in supervisions}
    language = named.pop() if len(named) == 1 else None
    return " ".join(texts), None if speaker is None else str(speaker), language


def _recording(cut: JsonObject) -> JsonObject:
    """Of a cut. Raises BadExample where it is none of one source."""
    recording = cut.get("recording")
    if not isinstance(recording, dict):
        raise BadExample("has no recording (cuts of features are not read)")
    if recording.get("transforms"):
        raise BadExample("has a recording with transforms: write its audio anew")
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        count = len(sources) if isinstance(sources, list) else 0
        raise BadExample(f"has a recording of {count} sources: write it as one file")
    return recording


def _of_recording(cut: JsonObject, root: str, file: Path) -> JsonObject:
    recording = _recording(cut)
    source = recording["sources"][0]
    kind = source.get("type")
    if kind not in ("file", "url"):
        raise BadExample(f"has a recording that is a {kind}: files and URLs are read")
    path = clip_path(text_field(source, "source"), file, root)
    return {"path": below(path, folder_of(file)), **_part(cut, recording)}


def _part(cut: JsonObject, recording: JsonObject) -> JsonObject:
    """Which part of its recording a cut is, and which channel; nothing where it is all of it."""
    clip: JsonObject = {}
    whole, start = seconds(recording, "duration"), seconds(cut, "start") or 0.0
    length = seconds(cut, "duration")
    if start or (length is not None and whole is not None and abs(length - whole) > 1e-3):
        clip |= {"start": start, "stop": None if length is None else start + length}
    channels, channel = recording["sources"][0].get("channels") or [0], cut.get("channel", 0)
    wanted = channel if isinstance(channel, list) else [channel]
    if set(wanted) != set(channels):
        if len(wanted) != 1 or wanted[0] not in channels:
            raise BadExample(f"is of the channels {wanted} of {channels}: one, or all, are read")
        clip["channel"] = channels.index(wanted[0])
    return clip


FORMAT = Lhotse()
