"""What JSON and YAML hold, as Python has it."""

from __future__ import annotations

from typing import Any

# Of a file, a line or a section: what is in a field is known where it is read or has been checked.
JsonObject = dict[str, Any]
Json = None | bool | int | float | str | list[Any] | JsonObject
