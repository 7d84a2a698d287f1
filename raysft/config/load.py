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
from raysft.config import explain, places, stages
from raysft.config.checkpoint import Checkpoint
from raysft.config.combinations import Mistake, contradictions
from raysft.config.deepspeed import filled
from raysft.config.explain import all_keys
from raysft.config.overrides import Dumper, apply_override, read_tree
from raysft.config.reference import entries
from raysft.config.schema import Config
from raysft.errors import UserError
from raysft.json_types import JsonObject

__all__ = [
    "all_keys",
    "apply_override",
    "begins_from",
    "changed_keys",
    "describe",
    "load_config",
    "pair_of",
    "read_tree",
    "stage_configs",
    "stages_to_yaml",
    "stand_in",
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
    tree = stages.override(_read(file), overrides)
    return validate(tree, str(path), file.parent, model)


def validate(
    tree: JsonObject, where: str, beside: Path | None = None, model: bool = True
) -> Config:
    """Check a plain tree against the schema; `where` names its origin in errors.

    beside: the folder of a config file, where a user may have meant relative paths to begin, and
    plugins to lie. model: see `load_config`.

    Of a tree with stages, each is checked as the config that it makes; the config that is returned
    is that of none of them: see `stage_configs`.
    """
    if problems := stages.mistakes(tree):
        config = None
    elif tree.get("stages"):
        config, problems = _check_stages(stages.expand(tree), where, beside, model)
    else:
        config, problems = _check(tree, where, beside, model)
    if problems:
        problems = list(dict.fromkeys(problems))
        if len(problems) == 1:
            raise UserError(f"{where}: {problems[0]}")
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"{where}: {len(problems)} mistakes\n{lines}")
    assert config is not None
    return config


def stage_configs(config: Config) -> dict[str, Config]:
    """Of a config with stages, that of each stage's run, by name, in order. Raises UserError."""
    tree = _stages_tree(config)
    found = {}
    for name in stages.names_of(tree):
        own = stages.tree_of(tree, name)
        assert own is not None
        found[name] = validate(own, f"stages.{name}")
    return found


def stand_in(config: Config, name: str) -> Config | None:
    """The config of a stage that begins from others whose models are not there yet: with what those
    begin with, which has the same shapes; None where there is none such."""
    own = stages.tree_of(_stages_tree(config), name, stand_in=True)
    return None if own is None else validate(own, f"stages.{name}")


def begins_from(config: Config, name: str) -> list[str]:
    """Names of the stages that a stage takes models of."""
    return list(dict.fromkeys(stages.begins_from(_stages_tree(config), name).values()))


def pair_of(config: Config, name: str) -> tuple[JsonObject, Path] | None:
    """The two models that a stage begins with as one (`stages.pair_of`), and the folder for that;
    None where it has no model.pair."""
    tree = _stages_tree(config)
    pair = stages.pair_of(tree, name)
    return None if pair is None else (pair, stages.start_of(stages.folder_of(tree), name))


def _stages_tree(config: Config) -> JsonObject:
    run = {"name": config.run.name, "storage_path": config.run.storage_path}
    return {"run": run, "stages": config.stages}


def stages_to_yaml(config: Config) -> str:
    """Of a config with stages: each as it was asked for, as YAML text that reads back as it."""
    tree = _stages_tree(config)
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _check_stages(
    tree: JsonObject, where: str, beside: Path | None, model: bool
) -> tuple[Config | None, list[str]]:
    """As `_check`, of a tree that `stages.expand` has made: what is wrong with the file itself,
    then with each stage; what is wrong with all of them in the same way is said once."""
    config, problems = _check(tree, where, beside, model, alone=False)
    names = stages.names_of(tree)
    found: dict[str, list[str]] = {}  # a line -> the stages that it is said of
    for name in names:
        own = stages.tree_of(tree, name)
        assert own is not None
        said = stages.unknown(tree, name) or _check(own, where, beside, model)[1]
        for line in said:
            found.setdefault(line, []).append(name)
    for line, of in found.items():
        if line not in problems:
            problems += [line] if of == names else [f"stages.{name}.{line}" for name in of]
    return (None if problems else config), problems


def _check(
    tree: JsonObject, where: str, beside: Path | None, model: bool, alone: bool = True
) -> tuple[Config | None, list[str]]:
    """The config of a tree, if nothing is wrong with it, and a line for whatever is.

    alone: whether it makes sense by itself; else only each value is looked at, and its name.
    """
    tree = _expand(tree)
    named = tree.get("plugins")
    try:  # before any name is looked up that they may add
        plugins.load(named if _are_texts(named) else [], beside)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    tree = filled(tree)

    def contradicts(config: Config) -> list[Mistake]:
        found = [one for one in contradictions(config) if alone or one.key == "run.name"]
        return [one for one in found if model or one.key != "model"]

    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found = explain.mistakes(error.errors())
        problems, wrong = list(found.values()), {".".join(map(str, place)) for place in found}
        rest = _without(tree, list(found))
        if rest is not None:  # what is right so far may still contradict itself
            rest, _ = places.absolute(rest)
            problems += [one.text for one in contradicts(rest) if not _concerns(one.key, wrong)]
        return None, problems
    config, problems = places.absolute(config, beside)
    return config, problems + [one.text for one in contradicts(config)]


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
