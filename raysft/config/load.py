"""YAML file + `key=value` overrides -> `Config`; every mistake is reported at once, by key.

Runs before Ray starts and costs milliseconds: nothing here imports torch or Ray. Relative paths in
a config are taken from the working directory, as on the command line.
"""

from __future__ import annotations

import copy
import difflib
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raysft.config.combinations import contradictions
from raysft.config.schema import Config
from raysft.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.2) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a config file and apply `key=value` overrides (values are YAML: `a.b=[1, 2]`).

    Raises UserError listing every problem: unknown keys (with the nearest one), wrong types,
    contradictions.
    """
    tree = _read(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return validate(tree, str(path))


def validate(tree: dict[str, Any], where: str) -> Config:
    """Check a plain tree against the schema; `where` names its origin in errors."""
    tree = _expand(tree)
    problems: list[str] = []
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors()]
        wrong = {".".join(map(str, detail["loc"])) for detail in error.errors()}
        rest = _without(tree, [detail["loc"] for detail in error.errors()])
        if rest is not None:  # what is right so far may still contradict itself
            found = contradictions(rest)
            problems += [p for p in found if p.split(":")[0].split(".")[0] not in wrong]
    if config is not None:
        problems = contradictions(config)
    if problems:
        problems = list(dict.fromkeys(problems))
        if len(problems) == 1:
            raise UserError(f"{where}: {problems[0]}")
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"{where}: {len(problems)} mistakes\n{lines}")
    assert config is not None
    return config


def _without(tree: dict[str, Any], locations: list[tuple[Any, ...]]) -> Config | None:
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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two config trees, with both values."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} (was {a!r}, now {b!r})")
    return found


def read_tree(text: str, where: str) -> dict[str, Any]:
    """Parse YAML text into a mapping; a UserError names file and line where it does not parse."""
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{where}: not valid YAML: {problem}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected sections like `data:`, found {type(tree).__name__}")
    return tree


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
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


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in a plain tree; numbers address the entries of a list."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: expected key=value, e.g. optim.lr=1e-4")
    parts = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(
                    f"{key}: {'.'.join(parts[:depth])} is a list of {len(node)}; "
                    f"{part!r} is none of its positions 0..{len(node) - 1}"
                )
            index: Any = int(part)
            if isinstance(node[index], str) and not last:
                node[index] = {"path": node[index]}
        else:
            index = part
        if last:
            node[index] = read_tree(f"value: {value}", key)["value"]
            return
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]
        if not isinstance(node, dict | list):
            raise UserError(f"{key}: {'.'.join(parts[: depth + 1])} is a value, it has no keys")


def _expand(tree: dict[str, Any]) -> dict[str, Any]:
    """A source given as a plain path, or a single source instead of a list."""
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
    return {**tree, "data": data}


def _explain(detail: Any) -> str:
    """One line for one pydantic error: key, what was found, what is allowed, the remedy."""
    key = ".".join(str(part) for part in detail["loc"]) or "the config"
    found = detail.get("input")
    kind = detail["type"]
    if kind == "extra_forbidden":
        siblings = _known(detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), siblings, n=1, cutoff=0.5)
        if not near:
            last = str(detail["loc"][-1])
            near = [k for k in all_keys() if k.rsplit(".", 1)[-1] == last][:1]
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(siblings)}"
        else:
            parent = ".".join(str(part) for part in detail["loc"][:-1])
            hint = f"did you mean {parent + '.' if parent else ''}{near[0]}?"
        return f"{key}: unknown key; {hint}"
    if kind == "missing":
        return f"{key}: missing"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}: expected keys below it, found {found!r}"
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{key}: expected {message}, found {found!r}"


def _model_at(location: typing.Sequence[Any]) -> type[BaseModel] | None:
    model: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if _is_section(model) else None
        if field is None:
            return None
        model = _section_of(field.annotation)
    return model if _is_section(model) else None


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _section_of(annotation: Any) -> Any:
    """The section type inside `X`, `X | None` or `list[X]`; None for plain values."""
    if _is_section(annotation):
        return annotation
    return next((a for a in typing.get_args(annotation) if _is_section(a)), None)


def _known(location: typing.Sequence[Any]) -> list[str]:
    model = _model_at(location)
    return list(model.model_fields) if model else []


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, in order; the keys of a list's items are written key[].name."""
    keys = []
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        if section is None:
            keys.append(prefix + name)
        else:
            many = typing.get_origin(field.annotation) is list
            keys += all_keys(section, f"{prefix}{name}{'[]' if many else ''}.")
    return keys


def describe(model: type[BaseModel] = Config, prefix: str = "") -> str:
    """The text of --help: each key with type, default and meaning."""
    lines: list[str] = []
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        if section is not None:
            many = typing.get_origin(field.annotation) is list
            title = f"{prefix}{name}{'[]' if many else ''}"
            about = field.description or (section.__doc__ or "").strip().splitlines()[0]
            lines += ["", f"{title}: {about}", describe(section, f"{title}.")]
            continue
        kind = _type_name(field.annotation)
        default = "required" if field.is_required() else _default(field)
        lines.append(f"  {prefix}{name} ({kind}; {default})\n      {field.description}")
    return "\n".join(lines)


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return "no default" if value is None else f"default {value!r}"


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return "|".join(str(a) for a in typing.get_args(annotation))
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin in (list, dict, tuple):
        inner = ", ".join(_type_name(a) for a in typing.get_args(annotation))
        return f"{origin.__name__} of {inner}"
    arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
    if arguments:
        return " or ".join(_type_name(a) for a in arguments)
    return getattr(annotation, "__name__", str(annotation))
