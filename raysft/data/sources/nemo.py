"""NeMo manifests: JSON lines with audio_filepath, text and duration; `offset` begins a part.

    {"audio_filepath": "a.wav", "offset": 1.5, "duration": 2.0, "text": "hello", "lang": "en"}

A clip is a path, from the manifest's folder where it is relative, or a list of them. With `tars` in
the entry (`audio_{0..127}.tar`) the clips are members of these archives: of the one that `shard_id`
numbers (the last number of its name; its place where names have none), else of any. `-sub1` before
the ending is another part of the member without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources import tars
from raysft.data.sources.base import default_id, folder_of, load_record
from raysft.data.sources.fielded import Fielded, told
from raysft.data.sources.layout import LANGUAGE, fault, inside, listed
from raysft.data.sources.webdataset import archive
from raysft.errors import BadExample
from raysft.json_types import JsonObject

_SUB = re.compile(r"-sub\d+$")
_NUMBER = re.compile(r"\d+")
_Members = dict[str, tuple[Path, tars.Member] | None]


class Nemo(Fielded):
    """The format `nemo`."""

    name = "nemo"
    options = ("root", "tars")
    describe = "NeMo manifests: JSON lines with audio_filepath, duration, text; tarred with tars"
    told_by = ("audio_filepath",)
    audio = ("audio_filepath",)
    said = ("text", "answer")
    start = "offset"
    length = "duration"
    languages = ("lang", "source_lang")
    harmless = (
        "lang",
        "sampling_rate",
        "shard_id",
        "taskname",
        "pnc",
        "source_lang",
        "target_lang",
    )

    def lists(self, given: Source) -> bool:
        """Where clips are elsewhere than a line says."""
        return given.tars is not None or super().lists(given)

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """The archives."""
        return [] if given.tars is None else _archives(file, given.tars)

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """Its lines, their clips from `root` on, or in the archives."""
        if given.tars is None:
            yield from super().records(file, given, keep)
            return
        archives = _archives(file, given.tars)
        by_shard: dict[int | None, _Members] = {}
        for item in self.items(file):
            at = f"{file.name}:{item.line}"
            try:
                if item.raw is None:
                    raise BadExample(item.error or "")
                record = load_record(item.raw)
                name, clips, text, speaker = self.read(record, file, item.line)
                shard = _shard(record.get("shard_id"))
                if shard not in by_shard:
                    by_shard[shard] = _members(archives, shard)
                told_clips = []
                for given_path, clip in zip(self.paths(record), clips, strict=True):
                    archive, member = _found(by_shard[shard], given_path)
                    place = inside(archive, member.name, member[1:], folder_of(file))
                    told_clips.append({**told(clip), **place})
            except BadExample as error:
                yield fault(default_id(file, item.line), str(error), at)
                continue
            more = {"speaker": speaker, "at": at, LANGUAGE: self.language(record)}
            yield listed(name, text, told_clips, **more)


def _archives(file: Path, pattern: str) -> list[Path]:
    """The archives of a manifest, in order. Raises UserError where one is not there."""
    return stores.at_once(lambda one: archive(one, file, "tars"), tars.expanded(pattern))


def _shard(given: object) -> int | None:
    """Of a record. Raises BadExample."""
    if isinstance(given, str) and given.strip().isdecimal():
        given = int(given)
    if given is not None and (not isinstance(given, int) or isinstance(given, bool)):
        raise BadExample(f"field 'shard_id' is {given!r}, expected a number", "malformed record")
    return given


def _members(archives: list[Path], shard: int | None) -> _Members:
    """Members by name: of archive number `shard`, or of all. None: archives have it twice."""
    some = archives
    if shard is not None:
        numbers = [_NUMBER.findall(archive.stem)[-1:] for archive in archives]
        by_number = {int(found[0]): a for found, a in zip(numbers, archives) if found}
        if len(by_number) < len(archives):  # not numbered, or by something else
            by_number = dict(enumerate(archives))
        if shard not in by_number:
            known = f"{min(by_number)} to {max(by_number)}"
            raise BadExample(f"shard_id is {shard}, and tars names the archives {known}")
        some = [by_number[shard]]
    found: _Members = {}
    ends: _Members = {}
    for one in some:
        for member in tars.members(one):
            name = member.name.removeprefix("./")
            found[name] = None if name in found else (one, member)
            last = PurePosixPath(name).name
            ends[last] = None if last in ends else (one, member)
    return {**ends, **found}


def _found(members: _Members, path: str) -> tuple[Path, tars.Member]:
    name = PurePosixPath(path)
    whole = name.with_name(_SUB.sub("", name.stem) + name.suffix)
    for one in (str(name), name.name, str(whole), whole.name):
        if one in members:
            if (place := members[one]) is None:
                raise BadExample(
                    f"field 'audio_filepath': {path} is in its tars more than once: name it as "
                    "its member is named, or give shard_id"
                )
            return place
    raise BadExample(f"field 'audio_filepath': {path} is in none of its tars")


FORMAT = Nemo()
