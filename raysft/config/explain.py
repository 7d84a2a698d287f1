"""What is wrong with a config, in words: one line a value, whatever pydantic has to say of it."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from raysft.config.aliases import our_key, our_value
from raysft.config.marks import one_of
from raysft.config.overrides import is_section, options, section_of
from raysft.config.schema import Config

Place = tuple[int | str, ...]  # keys and positions from the root of a tree down
_SHOWN = 80  # characters of a wrong value
_NOUNS: dict[object, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
}
_BOUNDS = (("gt", "greater than"), ("ge", "of at least"), ("lt", "below"), ("le", "of at most"))


def mistakes(errors: Sequence[ErrorDetails]) -> dict[Place, str]:
    """Where in the tree a value is wrong -> a line: its key, what was expected, what was found, and
    the remedy where there is one. errors: pydantic's, which names every branch of a union."""
    found: dict[Place, str] = {}
    for detail in errors:
        depth, annotation, bounds = _field(detail["loc"])
        if detail["type"] in ("extra_forbidden", "missing"):
            depth = len(detail["loc"])
        place = tuple(detail["loc"][:depth])
        key = ".".join(str(part) for part in place) or "the config"
        if place not in found:
            found[place] = _line(key, detail, annotation, bounds, depth)
    return found


def _line(
    key: str, detail: ErrorDetails, annotation: object, bounds: Sequence[object], depth: int
) -> str:
    kind, found = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(detail['loc'])}"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "value_error":  # a validator's own words
        words = detail["msg"].removeprefix("Value error, ")
        return f"{key}: expected {words}, found {shown(found)}{_ours(key, found)}"
    section = section_of(annotation)
    if section is not None and typing.get_origin(annotation) is not list:
        below = ", ".join(section.model_fields)
        return f"{key}: expected keys below it, found {shown(found)}; there are {below}"
    if len(detail["loc"]) > depth and kind not in _OF_A_BRANCH:
        found = _NOTHING  # a part of the value
    if "[key]" in detail["loc"]:
        return f"{key}: expected texts as keys below it, found {shown(found)}; put it into quotes"
    wanted = in_words(annotation, bounds)
    text = f"{key}: expected {wanted}" + ("" if found is _NOTHING else f", found {shown(found)}")
    return text + _remedy(key, annotation, found)


_NOTHING = object()
# Of a value that fits no branch of a union; other kinds below a key are of an entry of a list.
_OF_A_BRANCH = ("int_type", "int_from_float", "float_type", "string_type", "bool_type", "list_type")


def _ours(key: str, found: object) -> str:
    """Our name for another trainer's value, where it is one."""
    ours = our_value(key, found)
    return "" if ours is None else f"; write {ours}"


def _remedy(key: str, annotation: object, found: object) -> str:
    if ours := _ours(key, found):
        return ours
    texts = {str} & set(options(annotation))
    if texts and isinstance(found, int | float):
        return f'; a text that reads as another value needs quotes: "{shown(found)}"'
    numbers = {int, float, bool} & set(options(annotation))
    if numbers and isinstance(found, str):
        with contextlib.suppress(ValueError):
            if math.isfinite(float(found)):
                return "; write the number without quotes"
    return ""


def shown(value: object) -> str:
    """A wrong value as it would be written, not too long."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def in_words(annotation: object, bounds: Sequence[object] = ()) -> str:
    """A type as a user would say it: `a whole number greater than 0, or null`."""
    parts, literals, nullable = [], [], False
    for option, own in _bounded(annotation):
        if option is type(None):
            nullable = True
        elif typing.get_origin(option) is typing.Literal:
            literals += [repr(value) for value in typing.get_args(option)]
        else:
            parts.append(_noun(option, [*own, *bounds]))
    if literals:
        parts.append(one_of(literals))
    text = " or ".join(parts) if len(parts) < 2 or not literals else ", or ".join(parts)
    return f"{text}, or null" if nullable else text


def _noun(option: object, bounds: Sequence[object]) -> str:
    limits = [
        f"{words} {getattr(bound, name):g}"
        for bound in bounds
        for name, words in _BOUNDS
        if getattr(bound, name, None) is not None
    ]
    origin = typing.get_origin(option)
    if origin is list:
        return f"a list of {_count(bounds)}{_plural(typing.get_args(option)[0])}"
    if origin is dict:
        values = typing.get_args(option)[1]
        what = "" if values is Any else f", each with {in_words(values)}"
        return f"keys below it{what}"
    if is_section(option):
        return "keys below it"
    if option is bool:
        return "true or false"
    limits[1:] = [limit.removeprefix("of ") for limit in limits[1:]]
    return " ".join([f"a {_NOUNS.get(option, option)}", " and ".join(limits)]).strip()


def _count(bounds: Sequence[object]) -> str:
    least = next((b.min_length for b in bounds if hasattr(b, "min_length")), None)
    most = next((b.max_length for b in bounds if hasattr(b, "max_length")), None)
    if least is not None and least == most:
        return f"{least} "
    return f"at least {least} " if least else ""


def _plural(option: object) -> str:
    kinds = options(option)
    if len(kinds) == 1 and kinds[0] in _NOUNS:
        return f"{_NOUNS[kinds[0]]}s"
    return "entries" if any(is_section(kind) for kind in kinds) else in_words(option)


def _bounded(annotation: object) -> Iterator[tuple[object, list[object]]]:
    """The options of a union, each with its bounds."""
    if typing.get_origin(annotation) is typing.Annotated:
        first, *rest = typing.get_args(annotation)
        for option, own in _bounded(first):
            yield option, [*own, *rest]
    elif typing.get_origin(annotation) in (list, dict, typing.Literal):
        yield annotation, []
    elif arguments := typing.get_args(annotation):
        for argument in arguments:
            yield from _bounded(argument)
    else:
        yield annotation, []


def _field(location: Place) -> tuple[int, object, list[object]]:
    """How much of pydantic's location is a key of ours (behind it come the branches of a union),
    with the type and bounds that are there."""
    annotation: object = Config
    bounds: list[object] = []
    for depth, part in enumerate(location):
        section = section_of(annotation)
        inner = [a for a in options(annotation) if typing.get_origin(a) in (list, dict)]
        if section is not None and typing.get_origin(annotation) is not list:
            field = section.model_fields.get(str(part))
            if field is None:
                return depth, annotation, bounds
            annotation, bounds = field.annotation, list(field.metadata)
        elif len(options(annotation)) - (type(None) in options(annotation)) == 1 and inner:
            if "[key]" in location:
                return depth, annotation, bounds
            annotation, bounds = typing.get_args(inner[0])[-1], []
        else:
            return depth, annotation, bounds
    return len(location), annotation, bounds


def _nearest(location: Place) -> str:
    """What may have been meant by an unknown key."""
    name = str(location[-1])
    siblings = _known(location[:-1])
    parent = ".".join(str(part) for part in location[:-1])
    plain = {f"{parent}.{key}".lstrip(".") for key in siblings}
    found = our_key(name, all_keys())
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    typo = bool(near) and difflib.SequenceMatcher(None, name, near[0]).ratio() > 0.85
    if found is not None and (found[0] in plain or not typo):
        return f"did you mean {found[0]}?" + (f" ({found[1]})" if found[1] else "")
    close = difflib.get_close_matches(name, [key.rsplit(".", 1)[-1] for key in all_keys()], 1, 0.8)
    likely = bool(close) and not difflib.get_close_matches(name, near, cutoff=0.8)
    if near and not likely:
        return f"did you mean {parent + '.' if parent else ''}{near[0]}?"
    if close:
        return f"did you mean {next(k for k in all_keys() if k.rsplit('.', 1)[-1] == close[0])}?"
    return f"known here: {', '.join(siblings)}"


def _known(location: Place) -> list[str]:
    _, annotation, _ = _field(location)
    section = section_of(annotation)
    return list(section.model_fields) if section else []


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, in order; the keys of a list's items are written key[].name."""
    keys = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            keys.append(prefix + name)
        else:
            many = typing.get_origin(field.annotation) is list
            keys += all_keys(section, f"{prefix}{name}{'[]' if many else ''}.")
    return keys
