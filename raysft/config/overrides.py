"""`key=value` on the command line: YAML where the key takes more than a text, else as it is typed.

A key that only takes a text (run.name, every path) gets what was typed, `#`, `:`, braces and all;
only a value that is quoted as a whole loses its quotes, as in YAML, and `null` is none where there
may be none. All other values are YAML, without YAML's traps: what would be cut off as a comment is
kept (as part of a text) or refused, 010 and 1:30 are no numbers of another base, 2024-01-01 is no
date.
"""

from __future__ import annotations

import re
import typing
from typing import Any

import yaml

from raysft.config.marks import PathKey
from raysft.config.schema import Config, Section
from raysft.errors import UserError
from raysft.json_types import Json, JsonObject


class Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2 that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """As SafeLoader's, once each key."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, list | dict):
                raise yaml.MarkedYAMLError(problem=f"a key is a list or a mapping (line {line})")
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "").lower()
    base = {"0x": 16, "0o": 8, "0b": 2}.get(text.lstrip("+-")[:2], 10)
    if len(text) > 400:
        raise yaml.MarkedYAMLError(problem=f"a number of {len(text)} digits")
    return int(text, base)


# Not SafeLoader's: it also takes 1:30 for 90, 010 for 8 and 2024-01-01 for a date, and 1e-4 for
# a text.
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.rsplit(":", 1)[-1] in ("null", "bool")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$"),
    list("-+0123456789"),
)
Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either YAML would not read back as a text."""

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
            *Loader.yaml_implicit_resolvers.get(first, ()),
        ]
        for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **Loader.yaml_implicit_resolvers}
    }


def read_tree(text: str, where: str) -> JsonObject:
    """Parse YAML text into a mapping; a UserError names file and line where it does not parse."""
    tree = _load(text, where, joint=": ")
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected sections like `data:`, found {type(tree).__name__}")
    return tree


def apply_override(tree: JsonObject, override: str) -> None:
    """Set one `a.b.c=value` in a plain tree; numbers address the entries of a list."""
    key, equals, value = override.partition("=")
    if not equals or not key or not key.isprintable():
        raise UserError(f"{override!r}: expected key=value, e.g. optim.lr=1e-4")
    if not _is_text(override):
        raise UserError(f"{override!r}: not valid UTF-8")
    set_key(tree, key, read_value(value, key))


def set_key(tree: JsonObject, key: str, value: Json) -> None:
    """Set the dotted `key` in a plain tree; numbers address the entries of a list."""
    parts = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not (part.isascii() and part.isdecimal()) or int(part) >= len(node):
                positions = f"0..{len(node) - 1}" if node else "(it is empty)"
                raise UserError(
                    f"{key}: {'.'.join(parts[:depth])} is a list of {len(node)}; "
                    f"{part!r} is none of its positions {positions}"
                )
            index: Any = int(part)
            if isinstance(node[index], str) and not last:
                node[index] = {"path": node[index]}
        else:
            index = part
        if last:
            node[index] = value
            return
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        elif depth == 1 and key.startswith(("data.train.", "data.eval.")):
            # A single source is a list of one.
            node[index] = node[index] if isinstance(node[index], list) else [node[index]]
        node = node[index]
        if not isinstance(node, dict | list):
            raise UserError(f"{key}: {'.'.join(parts[: depth + 1])} is a value, it has no keys")


def read_value(typed: str, key: str) -> Json:
    """What `typed` means as the value of the dotted `key`. Raises UserError naming the key."""
    annotation, mark = _at(key)
    kinds = _kinds(annotation)
    texts = str in kinds or key in ("data.train", "data.eval")
    if kinds <= {str, type(None)}:
        return _text(typed, key, type(None) in kinds, mark is not None)
    try:
        node = yaml.compose(typed, Loader=Loader)
    except (yaml.YAMLError, RecursionError) as error:
        if texts and typed.lstrip()[:1] not in ("[", "{", '"', "'"):
            return typed
        raise _invalid(key, error) from None
    if node is None:  # nothing, or a comment alone
        return typed if typed.strip() else None
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, typed, key)
    if texts and not node.flow_style:
        return typed
    rest = typed[node.end_mark.index :].strip()
    if rest or _comments(typed):
        what = f"YAML would drop {rest!r}" if rest else "YAML would drop a comment"
        raise UserError(f"{key}: {what}; put texts with a # into quotes")
    return _load(typed, key)


def _text(typed: str, key: str, optional: bool, path: bool) -> str | None:
    """The value of a key that takes nothing but a text."""
    if optional and (typed.strip().lower() in ("", "null") or (typed == "~" and not path)):
        return None
    bare = typed.strip()
    if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'":
        try:
            node = yaml.compose(bare, Loader=Loader)
        except yaml.YAMLError:
            return typed  # quotes inside: "a" and "b"
        if isinstance(node, yaml.ScalarNode) and node.style == bare[0]:
            if not _is_text(node.value):
                raise UserError(f"{key}: {typed} holds half a surrogate pair, not text")
            return node.value
    return typed


def _scalar(node: yaml.ScalarNode, typed: str, key: str) -> Json:
    whole = typed.strip()
    if node.style in ("'", '"'):
        if node.end_mark.index < len(typed.rstrip()):
            return typed  # "a" #1
        return _load(typed, key)
    if node.style is not None or node.value != whole or node.tag.endswith(":str"):
        return typed
    return _load(typed, key)


def _comments(typed: str) -> bool:
    """Whether a list or mapping of several lines has a comment in it."""
    bare = re.sub(r"\"(?:[^\"\\]|\\.)*\"|'[^']*'", "", typed)
    return "\n" in bare and re.search(r"(?:^|\s)#", bare) is not None


def _load(text: str, where: str, joint: str = ".") -> Json:
    """The value of a YAML text; `joint` stands between `where` and the keys inside in messages."""
    try:
        tree = yaml.load(text, Loader=Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _invalid(where, error) from None
    _check_texts(tree, where, joint)
    return tree


def _check_texts(tree: object, where: str, joint: str) -> None:
    r"""Raise UserError where a text inside (written "\ud83d") has no bytes to be saved as."""
    rest: list[tuple[str, object]] = [("", tree)]
    seen: set[int] = set()
    while rest:
        place, node = rest.pop()
        if isinstance(node, str) and not _is_text(node):
            named = f"{where}{joint if place else ''}{place}"
            raise UserError(f"{named}: {node!r} holds half a surrogate pair, not text")
        if not isinstance(node, dict | list) or id(node) in seen:
            continue
        seen.add(id(node))  # an anchor may lead back
        inner = node.items() if isinstance(node, dict) else enumerate(node)
        rest += [(f"{place}{'.' if place else ''}{key}", item) for key, item in inner]
        if isinstance(node, dict):  # looked at first: a message is to name them
            rest += [(place, key) for key in node]


def _invalid(where: str, error: Exception) -> UserError:
    if isinstance(error, RecursionError):
        return UserError(f"{where}: not valid YAML: nested too deeply")
    problem = " ".join(str(error).split())
    return UserError(f"{where}: not valid YAML: {problem}")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _at(key: str) -> tuple[object, PathKey | None]:
    """The type of a dotted key (Any: unknown, or free), and its mark if it is a path."""
    annotation: Any = Config
    mark = None
    for part in key.split("."):
        section = section_of(annotation)
        if section is not None and typing.get_origin(annotation) is not list:
            field = section.model_fields.get(part)
            if field is None:
                return Any, None
            annotation = field.annotation
            mark = next((item for item in field.metadata if isinstance(item, PathKey)), None)
            continue
        inner = [a for a in options(annotation) if typing.get_origin(a) in (list, dict)]
        if not inner:
            return Any, None
        annotation = typing.get_args(inner[0])[-1]
        mark = None
    if section_of(annotation) is not None and typing.get_origin(annotation) is not list:
        return annotation | str, mark  # an entry of data.train may be a plain path
    return annotation, mark


def _kinds(annotation: object) -> set[object]:
    """The kinds of value an annotation allows: str, NoneType, or whatever else; Any also is str."""
    if annotation is Any:
        return {str, object}
    found: set[object] = set()
    for option in options(annotation):
        if typing.get_origin(option) is typing.Literal:
            found |= {type(value) for value in typing.get_args(option)}
        else:
            found.add(option)
    return found


def options(annotation: object) -> list[object]:
    """The types of a union, each without its bounds; the type itself if it is none."""
    if typing.get_origin(annotation) is typing.Annotated:
        return options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (list, dict, tuple, typing.Literal):
        return [annotation]
    arguments = typing.get_args(annotation)
    return [part for argument in arguments for part in options(argument)] or [annotation]


def is_section(annotation: object) -> typing.TypeGuard[type[Section]]:
    """Whether a type is a section of the config."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def section_of(annotation: object) -> type[Section] | None:
    """The section inside `X`, `X | None` or `list[X]`; None for plain values."""
    if is_section(annotation):
        return annotation
    return next((a for a in typing.get_args(annotation) if is_section(a)), None)
