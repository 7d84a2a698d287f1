"""A format: JSON lines of {"said": TEXT, "units": [NUMBER, ...]}, speech as units."""

from __future__ import annotations

from pathlib import Path

from raysft.data.example import Example, Units
from raysft.data.sources import json_lines, register
from raysft.data.sources.base import id_field, load_record, text_field
from raysft.errors import BadExample


class MyLines(json_lines.JsonLines):
    """The format `my_lines`."""

    name = "my_lines"
    describe = "JSON lines with said, units"

    def sniff(self, path: Path) -> bool:
        """By the name of a field."""
        return path.is_file() and b'"said"' in json_lines.head(path)

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of one line."""
        record = load_record(raw)
        text, units = text_field(record, "said"), record.get("units")
        if not isinstance(units, list) or not all(isinstance(unit, int) for unit in units):
            raise BadExample("field 'units' is no list of numbers")
        name = id_field(record, file, line)
        return Example(name, task or "asr", (Units(tuple(units)),), (text,), text=text)


register(MyLines())
