"""Sources: which format an entry of data.train or data.eval has, and which files it means.

First stage of sources -> index -> plan -> stream -> step -> checkpoint -> evaluate -> export.
A new format is one new module here with a `FORMAT` (see base.Format), or one given to `register`.
Resolving reads the head of a file; reading examples streams, in the memory of one item.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from raysft import paths, patience, stores
from raysft.config.schema import Source
from raysft.data.sources import causes, json_lines, tars
from raysft.data.sources.base import (
    Chunk,
    Format,
    Item,
    Located,
    ResolvedSource,
    Split,
    default_id,
    origin,
)
from raysft.data.sources.layout import Layout
from raysft.errors import BadExample, UserError

__all__ = ["ResolvedSource", "formats", "get", "read", "register", "resolve", "resolve_all", "scan"]

OPTIONS = ("root", "tars", "columns", "commands", "document_start", "subset")
"""Keys of an entry that only some formats read, but for those that `Layout.asked` tells of."""
LATER = ("judging",)
AUTO = "auto"  # a source's format: by the content of its files
_registered: dict[str, Format] = {}


def register(form: Format) -> None:
    """Add a format from outside, in every process that reads sources or makes an index.

    Where a file looks like several formats, `auto` takes the one of the least `rank`, of equals
    the one that came first. Raises UserError for a name that another has.
    """
    if _registered.get(form.name) is form:
        return
    if form.name == AUTO or form.name in formats():
        raise UserError(f"there is a format {form.name} already: give this one another name")
    _registered[form.name] = form


def formats() -> dict[str, Format]:
    """Every format by name: those of this package, then those given to `register`."""
    return _own() | _registered


@functools.cache
def _own() -> dict[str, Format]:
    """The modules of this package that have a `FORMAT`."""
    modules = (
        importlib.import_module(f"{__name__}.{info.name}")
        for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name)
    )
    found = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return {form.name: form for form in found}


def get(name: str) -> Format:
    """The format of that name. Raises UserError listing those there are."""
    known = formats()
    if name not in known:
        near = causes.near_format(name, known)
        raise UserError(f"no source format {name!r}{near}; there are: {AUTO}, {', '.join(known)}")
    return known[name]


def resolve(source: Source, split: Split, key: str | None = None) -> ResolvedSource:
    """Decide the format of `source` and list its files.

    key: the config key of the entry, for messages (`data.train[0]`).
    Raises UserError: no such path, an empty file, nothing readable, or a format that fits nothing.
    """
    key = key or f"data.{split}"
    try:
        return patience.patiently(lambda: _resolve(source, split, key), source.path)
    except OSError as error:
        where = error.filename or source.path
        raise UserError(f"{key}: cannot read {where}: {error.strerror}") from error


@stores.remembering()
def _resolve(source: Source, split: Split, key: str) -> ResolvedSource:
    try:
        places = [_place(paths.of_data(one)) for one in tars.expanded(source.path)]
    except UserError as error:
        raise UserError(f"{key}.path: {error}") from None
    path = places[0]
    files: list[Path] = []
    try:
        for place in places:
            if stores.is_file(place) and stores.state(place).size == 0:
                raise UserError(f"{place} is an empty file; expected examples in it")
        form = get(source.format) if source.format != AUTO else _recognise(path)
        _check_options(source, form)
        for place in places:
            files += form.files(place, split)
        if twice := [file for file, count in Counter(files).items() if count > 1]:
            raise UserError(f"{twice[0]} is named twice: name it once, and raise its weight")
        for file in files if form.text else ():
            if stores.is_file(file) and (what := causes.binary(json_lines.head(file))):
                raise UserError(f"{file} is {what}")
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    return ResolvedSource(
        key=key,
        name=source.name or path.stem,
        path=path,
        format=form.name,
        task=_task(source.task),
        weight=source.weight,
        files=tuple(files),
        given=source,
        split=split,
    )


def _place(given: str) -> Path:
    """A file or folder that is there. Raises UserError."""
    path = stores.at(given)
    if stores.is_remote(path):
        stores.refresh(path)
        if not stores.is_dir(path) and not stores.is_file(path):
            raise UserError(f"{path} does not exist")
        return path
    if not paths.exists(path):
        raise UserError(f"{path} does not exist{paths.nearest(path)}")
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder")
    return path


def _check_options(source: Source, form: Format) -> None:
    """Keys of an entry that its format does not read."""
    for name in (*OPTIONS, *LATER):
        if getattr(source, name) not in (None, False) and name not in getattr(form, "options", ()):
            takers = [f.name for f in formats().values() if name in getattr(f, "options", ())]
            raise UserError(f"{name}: format {form.name} does not read it; {', '.join(takers)} do")


def _task(given: str | None) -> str | None:
    """A source's task; asr and tts, which formats know, in any case."""
    plain = given.strip().lower() if given else None
    return plain if plain in ("asr", "tts") else given


def resolve_all(sources: list[Source], split: Split) -> list[ResolvedSource]:
    """Resolve every entry, and make their names in metrics differ.

    Entries that share a default name get their folder's name before it (a_test, b_test); a name
    that was given twice is refused.
    """
    found = [resolve(source, split, f"data.{split}[{i}]") for i, source in enumerate(sources)]
    shared = {name for name, count in Counter(item.name for item in found).items() if count > 1}
    names: list[str] = []
    for source, item in zip(sources, found, strict=True):
        name = item.name
        if name in shared and source.name is None:
            name = f"{item.path.parent.name}_{name}"
        elif name in names:
            raise UserError(f"{item.key}.name: {name!r} is the name of another entry too")
        base, number = name, 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return [replace(item, name=name) for name, item in zip(names, found, strict=True)]


def read(form: Format, item: Item, file: Path, task: str | None = None) -> Located:
    """One item as an example, or as the reason (naming file and line) why it is none.

    file: that it was read from; of a listing, what was listed is named."""
    file = origin(file) if not stores.is_remote(file) else file
    try:
        if item.raw is None:
            raise BadExample(item.error or "")
        example = form.parse(item.raw, file, item.line, task)
    except BadExample as error:
        reason = f"{place_of(form, item, file)}: {error}"
        name = error.example or default_id(file, item.line)
        return Located(item.offset, item.size, item.line, name, None, reason, error.kind)
    return Located(item.offset, item.size, item.line, example.id, example, None)


def place_of(form: Format, item: Item, file: Path) -> str:
    """A file and which of its items, for people. file: of a listing, what was listed."""
    line = line_of(form, item)
    return f"{file.name} {form.noun} {item.line if line is None else line}"


def line_of(form: Format, item: Item) -> int | None:
    """Which line of the file that was listed an item is of; None: of no line of it."""
    return form.line_of(item) if isinstance(form, Layout) else None


def scan(
    source: ResolvedSource, file: Path, chunk: Chunk | None = None, keep: Path | None = None
) -> Iterator[Located]:
    """The items of one of the source's files (or of a chunk of it), read one by one, in order, as
    the index would have them. keep: see `Layout.records`."""
    form = get(source.format)
    for item in _items(form, source, file, chunk, keep):
        yield read(form, item, file, source.task)


def _items(
    form: Format, source: ResolvedSource, file: Path, chunk: Chunk | None, keep: Path | None
) -> Iterator[Item]:
    if isinstance(form, Layout) and source.given is not None and form.lists(source.given):
        for number, record in enumerate(form.of_split(file, source.given, source.split, keep), 1):
            yield Item(0, 0, number, json.dumps(record, ensure_ascii=False).encode())
    else:
        yield from form.items(file, chunk)


def _recognise(path: Path) -> Format:
    known = formats()
    head = b"" if stores.is_dir(path) else json_lines.head(path)
    what = causes.binary(head)
    for form in sorted(known.values(), key=lambda form: form.rank):
        if not (what and form.text) and form.sniff(path):
            return form
    cause = f": it is {what}" if what else causes.foreign(path, head) if head else ""
    if stores.is_dir(path):
        cause = causes.folder(sorted(entry.name for entry in path.iterdir()))
    raise UserError(
        f"{path} is in no format that is known{': ' * (not what and bool(cause))}{cause}. Formats "
        f"(docs/formats.md shows a line of each; set the entry's format where it is one of these): "
        f"{', '.join(known)}. Found: {_found(path)}"
    )


def _found(path: Path) -> str:
    if stores.is_dir(path):
        names = sorted(entry.name for entry in path.iterdir())
        return f"a folder with {', '.join(names[:5]) or 'nothing in it'}" + ", ..." * (
            len(names) > 5
        )
    with stores.opened(path) as stream:
        return f"a file that begins with {stream.read(60)!r}"
