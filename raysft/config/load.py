"""YAML file + `key=value` overrides -> `Config`; every mistake is reported at once, by key.

Runs before Ray starts and costs milliseconds: nothing here imports torch or Ray. Every path comes
out absolute (places.py): relative ones, in the file and on the command line, begin at the folder
the command runs in.
"""

from __future__ import annotations

import copy
import difflib
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raysft import paths, plugins
from raysft.config import explain, places
from raysft.config.combinations import contradictions
from raysft.config.deepspeed import filled
from raysft.config.explain import all_keys
from raysft.config.overrides import Dumper, apply_override, read_tree
from raysft.config.reference import entries
from raysft.config.schema import Checkpoint, Config
from raysft.errors import UserError
from raysft.json_types import JsonObject

__all__ = [
    "all_keys",
    "apply_override",
    "changed_keys",
    "describe",
    "load_config",
    "read_tree",
    "to_tree",
    "to_yaml",
    "validate",
]


def load_config(
    path: str | Path, overrides: typing.Sequence[str] = (), *, model: bool = True
) -> Config:
    """Read a config file and apply `key=value` overrides (overrides.py: what a value means).

    model: whether the config has to name one: to prepare data none is needed.

    Raises UserError listing every problem: unknown keys (with the nearest one), wrong types, paths
    that are none, contradictions.
    """
    file = paths.argument(str(path), "CONFIG")
    tree = _read(file)
    for override in overrides:
        apply_override(tree, override)
    return validate(tree, str(path), file.parent, model)


def validate(
    tree: JsonObject, where: str, beside: Path | None = None, model: bool = True
) -> Config:
    """Check a plain tree against the schema; `where` names its origin in errors.

    beside: the folder of a config file, where a user may have meant relative paths to begin, and
    plugins to lie. model: see `load_config`.
    """
    tree = _expand(tree)
    named = tree.get("plugins")
    try:  # before any name is looked up that they may add
        plugins.load(named if _are_texts(named) else [], beside)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    tree = filled(tree)
    problems: list[str] = []
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found = explain.mistakes(error.errors())
        problems, wrong = list(found.values()), {".".join(map(str, place)) for place in found}
        rest = _without(tree, list(found))
        if rest is not None:  # what is right so far may still contradict itself
            rest, _ = places.absolute(rest)
            others = contradictions(rest)
            asked = [one for one in others if model or one.key != "model"]
            problems += [one.text for one in asked if not _concerns(one.key, wrong)]
    if config is not None:
        config, problems = places.absolute(config, beside)
        problems += [one.text for one in contradictions(config) if model or one.key != "model"]
    if problems:
        problems = list(dict.fromkeys(problems))
        if len(problems) == 1:
            raise UserError(f"{where}: {problems[0]}")
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"{where}: {len(problems)} mistakes\n{lines}")
    assert config is not None
    return config


def _concerns(key: str, wrong: set[str]) -> bool:
    """Whether one of the wrong keys is `key`, or above or below it."""
    return any(f"{key}.".startswith(f"{w}.") or f"{w}.".startswith(f"{key}.") for w in wrong)


def _without(tree: JsonObject, locations: list[explain.Place]) -> Config | None:
    """The config without the values at `locations`; None where the rest cannot stand alone."""
    tree = copy.deepcopy(tree)
    for location in locations:
        node: Any = tree
        for part in location[:-1]:
            node = node.get(part) if isinstance(node, dict) else node[part]
            if not isinstance(node, dict | list):
                return None
        if isinstance(node, list):
            return None
        node.pop(location[-1], None)
    try:
        return Config.model_validate(tree)
    except ValidationError:
        return None


def to_yaml(config: Config) -> str:
    """The resolved config as YAML text, every key written out."""
    tree = config.model_dump(mode="json")
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def to_tree(config: Config) -> JsonObject:
    """The resolved config as `validate` reads it; what nobody has chosen is left out where it
    follows from another key."""
    tree = config.model_dump(mode="json")
    kept = tree["checkpoint"]
    if kept["best_mode"] == Checkpoint(best=kept["best"]).best_mode:
        del kept["best_mode"]
    return tree


class Change(typing.NamedTuple):
    """A dotted key whose value is another now; as text: the key, with both values."""

    key: str
    was: object
    now: object

    def __str__(self) -> str:
        return f"{self.key} (was {self.was!r}, now {self.now!r})"


def changed_keys(old: JsonObject, new: JsonObject, prefix: str = "") -> list[Change]:
    """Dotted keys whose values differ between two config trees."""
    found: list[Change] = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(Change(f"{prefix}{key}", a, b))
    return found


def _read(path: Path) -> JsonObject:
    try:
        there = paths.exists(path)
    except UserError as error:
        raise UserError(f"CONFIG: {error}") from None
    if not there:
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: no such config file{hint}")
    if not path.is_file():
        raise UserError(f"{path}: is not a file; name the YAML file of the config")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return read_tree(text, str(path))


def _are_texts(value: object) -> typing.TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _expand(tree: JsonObject) -> JsonObject:
    """A source given as a plain path, a temperature as a number, or a single source or plugin
    instead of a list."""
    if isinstance(tree.get("plugins"), str):
        tree = {**tree, "plugins": [tree["plugins"]]}
    data = tree.get("data")
    if not isinstance(data, dict):
        return tree
    data = dict(data)
    for split in ("train", "eval"):
        sources = data.get(split)
        if isinstance(sources, str | dict):
            sources = [sources]
        if isinstance(sources, list):
            data[split] = [{"path": s} if isinstance(s, str) else s for s in sources]
    temperature = data.get("temperature")
    if isinstance(temperature, int | float) and not isinstance(temperature, bool):
        data["temperature"] = {"T": float(temperature)}
    return {**tree, "data": data}


def describe() -> str:
    """The text of --help: each key with type, default and meaning."""
    lines: list[str] = []
    for entry in entries():
        if entry.kind is None:
            lines += ["", f"{entry.key}: {entry.about}"]
            continue
        default = "required" if entry.default is None else f"default {entry.default}"
        default = default if entry.default != "" else "no default"
        lines.append(f"  {entry.key} ({entry.kind}; {default})\n      {entry.about}")
    return "\n".join(lines)
