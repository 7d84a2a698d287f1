"""USDM's list of clips for its decoder: a path, its units, and how often each is repeated.

    wavs/a.wav|17 9 402 17|3 1 2 5

The third field may be left out: each unit then stands once. A relative path begins at the folder of
the file.
"""

from __future__ import annotations

import re
from pathlib import Path

from raysft import stores
from raysft.data.example import Audio, Example
from raysft.data.sources import json_lines
from raysft.data.sources.base import BOM, clip_path, default_id
from raysft.data.sources.fields import names_audio_file
from raysft.data.sources.sounding import sounding
from raysft.errors import BadExample

_ROW = re.compile(r"([^|{]+)\|\s*(\d+(?:\s+\d+)*)\s*(?:\|\s*(\d+(?:\s+\d+)*)\s*)?")


class UnitList(json_lines.JsonLines):
    """The format `unit_list`."""

    name = "unit_list"
    describe = "lines of path|units|durations (USDM's decoder)"

    def sniff(self, path: Path) -> bool:
        """Whether its first line is such a row, of an audio file."""
        if stores.is_dir(path):
            return False
        for line in json_lines.first_lines(path)[:1]:
            row = _ROW.fullmatch(line.decode("utf-8", "replace").strip())
            return row is not None and names_audio_file(row[1])
        return False

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of one line. Raises BadExample naming what is wrong with it."""
        row = _ROW.fullmatch(raw.removeprefix(BOM).decode("utf-8", "replace").strip())
        if row is None:
            raise BadExample("is no row of path|units|durations", "malformed record")
        units = [int(one) for one in row[2].split()]
        times = [1] * len(units) if row[3] is None else [int(one) for one in row[3].split()]
        if len(times) != len(units):
            raise BadExample(
                f"has {len(units)} units and {len(times)} durations", "malformed record"
            )
        tokens = [unit for unit, count in zip(units, times, strict=True) for _ in range(count)]
        clip = Audio(clip_path(row[1].strip(), file))
        return sounding(default_id(file, line), clip, tokens, (), task)


FORMAT = UnitList()
