"""Listings: sources that are no plain files of lines on this system, written down as such once.

Stands between sources and the index. What a layout finds in folders and archives
(sources/layout.py), and files of lines that are packed or lie in a store, become files below the
index's folder, which are then surveyed, measured and read as any other:

    listed/<hash>/<folder>/<name>.jsonl     the records, or the lines as they were
                          /raysft-origin.json    what was listed, and its state then

The hash is that of the place and of what the entry says of it; a source that changes is listed
again into the same place, so that of a corpus that grows only the new is measured. Where nothing of
it has changed it is not read. Several runs may list a source at once: each writes the file whole.
Costs about 10 us a record, and a pass over the headers of archives.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raysft import patience, stores
from raysft.data import sources as formats
from raysft.data.index.fan_out import fan_out
from raysft.data.index.part import digest_of, writing
from raysft.data.sources import OPTIONS, ResolvedSource
from raysft.data.sources.base import ORIGIN
from raysft.data.sources.layout import LANGUAGE, Layout, fault, here, running_in
from raysft.errors import UserError
from raysft.json_types import JsonObject

VERSION = 2
"""Raise it when a layout lists otherwise than before."""

_RACY_NS = 2_000_000_000


def listed(
    resolved: list[ResolvedSource], folder: Path, workers: int | None, languages: bool = False
) -> list[ResolvedSource]:
    """The sources, their files those of listings where they need one; folder: the index's.

    languages: whether the language that a record names is kept; other runs have listings without.
    Raises UserError naming the source: a file whose structure is broken, a folder that cannot be
    written, storage that does not answer.
    """
    where = here()  # not that of a task of Ray
    jobs = [
        (source, file, folder, where, languages) for source in resolved for file in source.files
    ]
    needed = stores.at_once(lambda job: _needed(*job[:2]), jobs)
    todo = [job for job, need in zip(jobs, needed, strict=True) if need]
    sizes = stores.at_once(lambda job: _size(job[1]), todo)
    made = iter(fan_out(_listing, todo, sizes, None, workers))
    places = iter([next(made) if need else file for (_, file, *_), need in zip(jobs, needed)])
    return [replace(source, files=tuple(next(places) for _ in source.files)) for source in resolved]


def _needed(source: ResolvedSource, file: Path) -> bool:
    form = formats.get(source.format)
    if isinstance(form, Layout) and source.given is not None and form.lists(source.given):
        return True
    return form.text and (
        stores.is_remote(file) or patience.known(lambda: stores.packed(file), file)
    )


def _size(file: Path) -> int:
    def size() -> int:
        return 1 if stores.is_dir(file) else max(1, stores.state(file).size)

    return patience.known(size, file)


def _listing(job: tuple[ResolvedSource, Path, Path, str, bool], _: None) -> Path:
    source, file, folder, where, languages = job
    try:
        with running_in(where):
            return patience.known(lambda: _made(source, file, folder, languages), file)
    except UserError as error:
        raise UserError(f"{source.key}: {error}") from error


def _made(source: ResolvedSource, file: Path, folder: Path, languages: bool) -> Path:
    given = source.given
    facts = () if given is None else tuple(getattr(given, name) for name in OPTIONS)
    form = formats.get(source.format)
    if given is not None and isinstance(form, Layout):
        facts += form.asked(given)
        facts += (source.split,) if form.by_split else ()
    facts += (LANGUAGE,) if languages else ()
    name = digest_of(VERSION, str(file), source.format, *facts)
    place = folder / "listed" / name / (file.parent.name or "root") / f"{file.stem}.jsonl"
    note = place.parent / ORIGIN
    before = _states(source, file)
    if before is not None and place.exists() and _noted(note).get("states") == before:
        return place
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    with writing(folder):
        place.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(source, file, temporary, place.parent, languages)
        if _states(source, file) != before:
            raise UserError(f"{file} changed while it was listed; start again")
        with writing(folder):
            # The same again: it stays, and with it all that is known of it.
            if place.exists() and filecmp.cmp(temporary, place, shallow=False):
                temporary.unlink()
            _note(note, {"origin": str(file), "listing": place.name})
            if temporary.exists():
                os.replace(temporary, place)
            settled = before is not None and not _racy(before)
            _note(
                note,
                {"origin": str(file), "listing": place.name, "states": before if settled else None},
            )
    finally:
        temporary.unlink(missing_ok=True)
    return place


def _write(source: ResolvedSource, file: Path, target: Path, keep: Path, languages: bool) -> None:
    form = formats.get(source.format)
    given = source.given
    with target.open("wb") as stream:
        if isinstance(form, Layout) and given is not None and form.lists(given):
            for record in form.of_split(file, given, source.split, keep):
                if not languages:
                    record.pop(LANGUAGE, None)
                stream.write(_line(record, file) + b"\n")
        else:
            with stores.opened(file) as origin:
                shutil.copyfileobj(origin, stream, 1 << 20)


def _line(record: JsonObject, file: Path) -> bytes:
    """A record as JSON in UTF-8, or what is wrong where a name in it is in no UTF-8."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        quote = text.rfind('"', 0, error.start) + 1
        shown = text[quote : text.find('"', error.start)].encode("ascii", "backslashreplace")
        reason = f"the name {shown.decode()} is not in UTF-8: rename it (convmv)"
        return json.dumps(fault(shown.decode(), reason, str(file))).encode()


def _states(source: ResolvedSource, file: Path) -> list[list[str | int]] | None:
    """Of all that a listing is made of; None: that is not known without making it."""
    form = formats.get(source.format)
    others: Sequence[Path] | None = []
    if isinstance(form, Layout) and source.given is not None and form.lists(source.given):
        others = form.beside(file, source.given)
    if others is None:
        return None
    own = [] if stores.is_dir(file) else [file]
    found: list[list[str | int]] = [[str(one), *stores.state(one)] for one in (*own, *others)]
    if isinstance(form, Layout) and form.from_here:
        found.append([here(), 0, 0])
    return found


def _racy(states: list[list[str | int]]) -> bool:
    """Whether something was written just now, and can change once more within the clock's grain."""
    now = time.time_ns()
    return any(now - int(mtime) < _RACY_NS for _, _, mtime in states)


def _noted(note: Path) -> JsonObject:
    try:
        return json.loads(note.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _note(note: Path, content: JsonObject) -> None:
    temporary = note.with_name(f".{note.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, note)
