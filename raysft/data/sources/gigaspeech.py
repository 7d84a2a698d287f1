"""GigaSpeech's metadata: one JSON file of recordings and their segments.

    {"audios": [{"aid": "A1", "path": "audio/a.opus", "segments":
        [{"sid": "S1", "begin_time": 1.5, "end_time": 3.5, "text_tn": "HELLO <PERIOD>"}]}]}

A segment is an example; of its tags, <COMMA>, <PERIOD>, <QUESTIONMARK> and <EXCLAMATIONPOINT>
become the marks they name, and one that is all <SIL>, <MUSIC>, <NOISE> or <OTHER> is none. Paths
begin at the file's folder, or at `root`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources import json_items, json_lines
from raysft.data.sources.base import (
    BOM,
    clip_path,
    default_id,
    folder_of,
    kind,
    load_record,
    text_field,
)
from raysft.data.sources.layout import Layout, below, fault, listed, seconds
from raysft.errors import BadExample, UserError
from raysft.json_types import Json, JsonObject

_MARKS = {" <COMMA>": ",", " <PERIOD>": ".", " <QUESTIONMARK>": "?", " <EXCLAMATIONPOINT>": "!"}
_GARBAGE = frozenset(["<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>"])
_TAG = re.compile(r"<[A-Z]+>")


class GigaSpeech(Layout):
    """The format `gigaspeech`."""

    name = "gigaspeech"
    options = ("root", "subset")
    describe = "GigaSpeech's JSON: audios with path and segments"
    tags = _GARBAGE

    def sniff(self, path: Path) -> bool:
        """Whether its head has the names."""
        if stores.is_dir(path):
            return False
        head = json_lines.head(path).removeprefix(BOM)
        return head.lstrip()[:1] == b"{" and all(
            name in head for name in (b'"audios"', b'"segments"', b'"begin_time"')
        )

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A segment each."""
        folder = folder_of(file)
        for item in json_items.items(file, key="audios"):
            at = f"{file.name}: audio {item.line}"
            try:
                if item.raw is None:
                    raise BadExample(item.error or "")
                audio = load_record(item.raw)
                path = clip_path(text_field(audio, "path"), file, given.root)
                segments = audio.get("segments") or []
                if not isinstance(segments, list):
                    raise BadExample("field 'segments' is no list")
            except BadExample as error:
                yield fault(default_id(file, item.line), str(error), at)
                continue
            for number, segment in enumerate(segments, 1):
                name = f"{audio.get('aid') or item.line}:{number}"
                try:
                    if not isinstance(segment, dict):
                        raise BadExample(f"is {kind(segment)}, expected an object")
                    name = str(segment.get("sid") or name)
                    if not _meant(segment.get("subsets"), given.subset, file):
                        continue
                    start, stop = seconds(segment, "begin_time"), seconds(segment, "end_time")
                    if start is None or stop is None:
                        raise BadExample("has no begin_time or no end_time")
                    text = _text(text_field(segment, "text_tn"))
                except BadExample as error:
                    yield fault(name, f"segment {name}: {error}", at)
                    continue
                clip: JsonObject = {"path": below(path, folder), "start": start, "stop": stop}
                speaker = segment.get("speaker") or audio.get("speaker")
                speaker = None if speaker in (None, "N/A") else str(speaker)
                yield listed(name, text, [clip], speaker=speaker, at=f"{file.name}: {name}")


def _meant(subsets: Json, wanted: str | None, file: Path) -> bool:
    """Whether a segment of these subsets (["{L}", "{XL}"]) is of the one that is wanted. Raises
    UserError where none is named and it is kept for evaluation; BadExample."""
    if subsets is None:
        subsets = []
    if not isinstance(subsets, list):
        raise BadExample(f"has subsets that are {kind(subsets)}, expected a list")
    own = {str(name).strip("{}").upper() for name in subsets}
    if wanted is not None:
        return wanted.strip("{}").upper() in own
    if kept := sorted(own & {"DEV", "TEST"}):
        raise UserError(
            f"{file} has segments of {kept[0]} beside others: say whose are meant (subset: XL, L, "
            "M, S, XS, DEV or TEST)"
        )
    return True


def _text(text: str) -> str:
    for tag, mark in _MARKS.items():
        text = text.replace(tag, mark)
    unknown = [tag for tag in _TAG.findall(text) if tag not in _GARBAGE]
    if unknown:
        raise BadExample(f"holds {unknown[0]}, a tag that is not known")
    return text


FORMAT = GigaSpeech()
