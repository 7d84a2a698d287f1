"""What a run that goes on may change: the rule that each key of the schema has on itself.

Read by whoever holds a config against that of a run: its folder, its plan, its schedule.
"""

from __future__ import annotations

import typing
from functools import cache

from raysft.config.marks import Resume, Rule
from raysft.config.overrides import section_of
from raysft.config.schema import Config, Section


def rule_of(key: str) -> Resume:
    """The rule of a dotted key, or of what is below it (data.mix.asr). Raises KeyError where there
    is no such key."""
    known, parts = rules(), key.split(".")
    for length in range(len(parts), 0, -1):
        if (mark := known.get(".".join(parts[:length]))) is not None:
            return mark
    raise KeyError(key)


def keys_with(rule: Rule) -> list[str]:
    """The dotted keys of that rule, in the order of the schema."""
    return [key for key, mark in rules().items() if mark.rule == rule]


def stepwise() -> list[str]:
    """The dotted keys that a sweep may change between two steps of a trial's run."""
    return [key for key, mark in rules().items() if mark.steps]


@cache
def rules() -> dict[str, Resume]:
    """Dotted key -> its rule. That of a list holds for its entries."""
    return dict(_rules(Config, ""))


def _rules(section: type[Section], prefix: str) -> list[tuple[str, Resume]]:
    found = []
    for name, field in section.model_fields.items():
        marks = [item for item in field.metadata if isinstance(item, Resume)]
        found += [(prefix + name, mark) for mark in marks[-1:]]
        inner = section_of(field.annotation)
        if inner is not None and typing.get_origin(field.annotation) is not list:
            found += _rules(inner, f"{prefix}{name}.")
    return found
