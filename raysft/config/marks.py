"""Marks on the keys of the config: what their text is, beyond a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class PathKey:
    """Marks a key whose text is a path: `places` makes it absolute, by the rule of raysft.paths.

    kind: file; model: a folder, or a hub id; store: a folder, or the URL of a store.
    read: whether something has to be there already.
    """

    kind: Literal["file", "model", "store"] = "file"
    read: bool = False


@dataclass(frozen=True)
class OneOf:
    """Marks a key that takes one name of a table, and refuses all others.

    names: of the table, which may grow: it is asked whenever a value is looked at.
    """

    names: Callable[[], Sequence[str]]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """What pydantic checks instead of the text itself."""
        return core_schema.no_info_plain_validator_function(self._checked)

    def _checked(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.names():
            raise ValueError(one_of([repr(name) for name in self.names()]))
        return value


def one_of(texts: Sequence[str]) -> str:
    """Texts as a choice: `a, b or c`."""
    return " or ".join(part for part in (", ".join(texts[:-1]), *texts[-1:]) if part)
