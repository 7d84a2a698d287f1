"""Every key of the config, in words: what `--help` prints and the reference is made of."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raysft.config.marks import OneOf
from raysft.config.overrides import section_of
from raysft.config.schema import Config


class Entry(NamedTuple):
    """A key, or the section that those behind it are in (then without kind and default).

    key: dotted; `[]` after a list of sections. default: as Python writes it; "" where there is
    none; None where the key has to be given.
    """

    key: str
    about: str
    kind: str | None = None
    default: str | None = None


def entries(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Entry]:
    """All keys below `model`, in the order of the schema, each section before its own."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            many = typing.get_origin(field.annotation) is list
            title = f"{prefix}{name}{'[]' if many else ''}"
            yield Entry(title, field.description or (section.__doc__ or "").strip().splitlines()[0])
            yield from entries(section, f"{title}.")
            continue
        table = next((mark for mark in field.metadata if isinstance(mark, OneOf)), None)
        kind = _type_name(field.annotation) if table is None else "|".join(table.names())
        default = None if field.is_required() else _default(field)
        yield Entry(f"{prefix}{name}", field.description or "", kind, default)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "" if value is None else repr(value)


def _type_name(annotation: object) -> str:
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
