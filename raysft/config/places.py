"""The paths in a config, made absolute once, on the driver, by the rule of raysft.paths.

What is relative begins at the folder the command runs in. `checkpoint.path` alone begins at
run.storage_path (where the run goes, its checkpoints go), and stays as it is given.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from raysft import paths
from raysft.config.marks import PathKey
from raysft.config.overrides import section_of
from raysft.config.schema import Config, Section
from raysft.errors import UserError
from raysft.json_types import JsonObject

_Section = TypeVar("_Section", bound=Section)
BYTES = "bytes"  # model.tokenizer: no path


def absolute(config: Config, beside: Path | None = None) -> tuple[Config, list[str]]:
    """`config` with absolute paths, and a line for each path that is none.

    beside: the folder of the config file. A path that is not there, but would be there or in a
    folder above it, is such a line too: many tools begin relative paths at the file.
    """
    problems: list[str] = []
    return _section(config, "", beside, problems), problems


def _section(section: _Section, prefix: str, beside: Path | None, problems: list[str]) -> _Section:
    update: JsonObject = {}
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        mark = next((item for item in field.metadata if isinstance(item, PathKey)), None)
        if mark is not None and isinstance(value, str):
            try:
                update[name] = _place(value, mark, key, beside)
            except UserError as error:
                problems.append(f"{key}: {error}")
        elif isinstance(value, Section):
            update[name] = _section(value, f"{key}.", beside, problems)
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            update[name] = [
                _section(item, f"{key}.{number}.", beside, problems)
                for number, item in enumerate(value)
            ]
    return section.model_copy(update=update)


def _place(given: str, mark: PathKey, key: str, beside: Path | None) -> str:
    if key == "model.tokenizer" and given == BYTES:
        return given
    if mark.kind == "store":
        if paths.is_store(given):
            return given
        place = paths.absolute(given)
        return place if given.startswith(("/", "~", "file:")) else given
    if mark.kind == "data" and paths.is_store(given):
        return given
    place = paths.model(given) if mark.kind == "model" else paths.absolute(given)
    folder_only = mark.kind in ("file", "data") or paths.looks_local(
        given
    )  # else it may be a hub id
    relative = folder_only and not os.path.isabs(os.path.expanduser(given))
    if mark.read and beside is not None and relative:
        here = paths.absolute(given)
        for folder in () if os.path.exists(here) else (beside, *beside.parents):
            there = os.path.join(folder, given)
            if os.path.exists(there):
                raise UserError(
                    f"{here} does not exist, but {there} does: relative paths begin at the folder "
                    f"the command runs in; run it in {folder}, or write the whole path"
                )
    return place


def keep_same(old: JsonObject, new: JsonObject, section: type[Section] = Config) -> JsonObject:
    """The tree `old` of a run, with the paths of `new` where those mean what its own do: a run may
    be continued from another folder, and with what it reads in another place."""
    found = dict(old)
    for name, field in section.model_fields.items():
        a, b = old.get(name), new.get(name)
        inner = section_of(field.annotation)
        if inner is not None and isinstance(a, dict) and isinstance(b, dict):
            found[name] = keep_same(a, b, inner)
        elif isinstance(a, str) and isinstance(b, str):
            marked = any(isinstance(item, PathKey) for item in field.metadata)
            if marked and paths.same(a, b):
                found[name] = b
    return found
