"""Rubrics and wordings: the files that say how a dimension is asked about.

The package's own lie in raysft/data/rubrics; an entry's `judging` names others. They are named in a
listing with the digest of their contents, so that a run never goes on with others than it began
with.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import cast

import yaml

from raysft import paths, stores
from raysft.errors import UserError
from raysft.json_types import JsonObject

OWN = "raysft:"  # before the name of a file of the package
_FOLDER = Path(__file__).parent / "rubrics"
_TEXTS = ("context", "one", "varied", "all", "header", "all_long", "all_short")
_KEYS = ("field", "label", "scale", "means", "anchors")  # of a dimension
OVERALL = "overall"  # what tables call all dimensions
_PLACES = {"one": ("rubric", "context"), "varied": ("rubric", "context"), "all": ("rubric",)}
Named = tuple[str, str]  # a file, and the digest of its contents


@dataclass(frozen=True)
class Rubric:
    """Of one dimension. field: of `annotations`. line: in a rubric of all dimensions, short."""

    name: str
    field: str
    label: str
    lowest: int
    highest: int
    text: str
    long: str
    line: str


@dataclass(frozen=True)
class Rubrics:
    """A file of rubrics. texts: by the keys in _TEXTS; dimensions: by name, in the fixed order."""

    texts: Mapping[str, str]
    dimensions: Mapping[str, Rubric]

    def chosen(self, names: Sequence[str] | None) -> list[Rubric]:
        """Those of some dimensions, in the fixed order; None: all. Raises UserError for a dimension
        without a rubric."""
        for name in names or ():
            if name not in self.dimensions:
                near = get_close_matches(name, self.dimensions, 1)
                meant = f" (did you mean {near[0]}?)" if near else ""
                raise UserError(
                    f"judging.dimensions: {name!r} has no rubric{meant}; there are: "
                    f"{', '.join(self.dimensions)}"
                )
        return [one for name, one in self.dimensions.items() if names is None or name in names]


def named(given: str | None, own: str) -> Named:
    """The file that is read: the one given, or the package's `own`. Raises UserError."""
    name = f"{OWN}{own}" if given is None else paths.of_data(given)
    return name, hashlib.sha256(_content(name)).hexdigest()[:16]


def _content(name: str) -> bytes:
    path = _FOLDER / name.removeprefix(OWN) if name.startswith(OWN) else stores.at(name)
    try:
        with stores.opened(path) as stream:
            return stream.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _known(name: str, digest: str) -> bytes:
    content = _content(name)
    if hashlib.sha256(content).hexdigest()[:16] != digest:
        raise UserError(
            f"{name} has changed since the data that it is for were indexed: put it back, or begin "
            "a new run"
        )
    return content


@functools.lru_cache(maxsize=16)
def rubrics(name: str, digest: str) -> Rubrics:
    """The rubrics of a file. Raises UserError naming what is wrong with it."""
    try:
        found = yaml.safe_load(_known(name, digest))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: no YAML: {' '.join(str(error).split())}") from None
    found = found if isinstance(found, dict) else {}
    lacking = [key for key in (*_TEXTS, "scale", "dimensions") if not found.get(key)]
    if lacking:
        raise UserError(
            f"{name}: no rubrics, for it has no {', '.join(lacking)}: begin with a copy of "
            f"{_FOLDER / 'role.yaml'}"
        )
    if unknown := [str(key) for key in found if key not in (*_TEXTS, "scale", "dimensions")]:
        raise UserError(f"{name}: {', '.join(unknown)}: nothing reads this; leave it out")
    for key in _TEXTS:
        if not isinstance(found[key], str):
            raise UserError(f"{name}: {key} is {found[key]!r}, expected a text")
    for key, places in _PLACES.items():
        for place in places:
            if f"{{{place}}}" not in found[key]:
                raise UserError(f"{name}: {key} has no {{{place}}}, where that is to stand")
    if not isinstance(found["dimensions"], dict):
        raise UserError(f"{name}: dimensions: expected rubrics by name")
    dimensions = {
        key: _rubric(name, key, value, found) for key, value in found["dimensions"].items()
    }
    for what in ("label", "field"):  # answers tell them apart by one, records by the other
        given = [getattr(one, what) for one in dimensions.values()]
        if twice := [one for one in given if given.count(one) > 1]:
            raise UserError(f"{name}: two dimensions have the {what} {twice[0]}: name one anew")
    return Rubrics({key: found[key] for key in _TEXTS}, dimensions)


def _rubric(file: str, name: str, given: object, found: JsonObject) -> Rubric:
    where = f"{file}: dimensions.{name}"
    if not isinstance(name, str) or not re.fullmatch(r"[-.\w ]+", name) or name == OVERALL:
        raise UserError(f"{where}: name it in letters, digits, - and _, and not {OVERALL}")
    if not isinstance(given, dict) or not all(given.get(key) for key in ("means", "anchors")):
        raise UserError(f"{where}: has no rubric: expected means and anchors")
    if unknown := [str(key) for key in given if key not in _KEYS]:
        raise UserError(f"{where}: {', '.join(unknown)}: expected {', '.join(_KEYS)} alone")
    scale = given.get("scale", found["scale"])
    if not isinstance(scale, list) or len(scale) != 2 or not _is_scale(*scale):
        raise UserError(
            f"{where}: scale is {scale!r}, expected two digits as [lowest, highest]: an answer is "
            "one of them"
        )
    lowest, highest = scale
    anchors = given["anchors"]
    values = list(range(highest, lowest - 1, -1))
    if not isinstance(anchors, dict) or set(anchors) != set(values):
        raise UserError(
            f"{where}: anchors of {lowest} to {highest} are needed, found "
            f"{', '.join(map(str, anchors)) or 'none'}"
        )
    if hole := [value for value in values if anchors[value] in (None, "")]:
        raise UserError(f"{where}: anchors.{hole[0]} says nothing: say what a {hole[0]} is")
    label, field = (str(given.get(key) or name) for key in ("label", "field"))
    example = values[1] if len(values) > 2 else values[0]
    told = "\n".join(f"{value}: {anchors[value]}" for value in values)
    head = f"Dimension: {label} - {given['means']}"
    text = f"{found['header']}\n\n{head}\n{told}\nExample output: {example}"
    scaled = f" ({lowest}-{highest})" if scale != found["scale"] else ""
    line = f"{label}{scaled}: {given['means']}"
    return Rubric(name, field, label, lowest, highest, text, f"{line}\n{told}", line)


def _is_scale(lowest: object, highest: object) -> bool:
    whole = type(lowest) is int and type(highest) is int
    return whole and 0 <= cast(int, lowest) < cast(int, highest) <= 9


@functools.lru_cache(maxsize=16)
def variations(name: str, digest: str) -> dict[str, tuple[str, ...]]:
    """Wordings by dimension, its name in one spelling. Raises UserError."""
    try:
        found = json.loads(_known(name, digest))
    except ValueError as error:
        raise UserError(f"{name}: no JSON: {error}") from None
    inner = found.get("variations", found) if isinstance(found, dict) else None
    prompts = inner.get("dimension_prompts") if isinstance(inner, dict) else None
    if not isinstance(prompts, list) or not prompts:
        raise UserError(
            f"{name}: no variations: expected variations.dimension_prompts, a list of "
            "{dimension_name, prompt_text}"
        )
    by_name: dict[str, list[str]] = {}
    for number, one in enumerate(prompts):
        one = one if isinstance(one, dict) else {}
        dimension, text = one.get("dimension_name"), one.get("prompt_text")
        if not isinstance(dimension, str) or not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{name}: dimension_prompts[{number}]: expected dimension_name and prompt_text"
            )
        by_name.setdefault(plain(dimension), []).append(text)
    return {key: tuple(texts) for key, texts in by_name.items()}


def plain(name: str) -> str:
    """A dimension's name in one spelling: of PitchDynamics and pitch_dynamics the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def wordings(rubric: Rubric, prompts: Mapping[str, tuple[str, ...]], file: str) -> tuple[str, ...]:
    """Those of a dimension. Raises UserError where there is none."""
    for name in (rubric.name, rubric.label, rubric.field):
        if plain(name) in prompts:
            return prompts[plain(name)]
    raise UserError(
        f"{file}: has no prompt for {rubric.name}: add one, or leave it out (judging.dimensions)"
    )
