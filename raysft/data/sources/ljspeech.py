"""LJSpeech's folder: a table without quotes, and clips in wavs/.

metadata.csv   LJ001-0001|Printing, in 1 sense|Printing, in one sense       wavs/LJ001-0001.wav
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources.base import Split
from raysft.data.sources.layout import Layout, fault, listed
from raysft.data.sources.lines import lines
from raysft.json_types import JsonObject


class LJSpeech(Layout):
    """The format `ljspeech`: a source is the folder, or its metadata.csv."""

    name = "ljspeech"
    describe = "LJSpeech's folder: metadata.csv (id|text|normalised) and wavs/"

    def sniff(self, path: Path) -> bool:
        """Whether there are both."""
        folder = path if stores.is_dir(path) else path.parent
        meta = folder / "metadata.csv"
        if not (stores.is_file(meta) and stores.is_dir(folder / "wavs")):
            return False
        return "|" in next(iter(lines(meta)), (0, ""))[1]

    def files(self, path: Path, split: Split) -> list[Path]:
        """The table."""
        return [path / "metadata.csv" if stores.is_dir(path) else path]

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """Nothing else: clips are looked at one by one."""
        return []

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A line each: bars part its fields, and quotes are text. Normalised text is taken."""
        for number, line in lines(file):
            fields = line.split("|")
            at = f"{file.name}:{number}"
            if len(fields) not in (2, 3):
                yield fault(fields[0], f"{len(fields)} fields, expected id|text|normalised", at)
                continue
            yield listed(
                fields[0].strip(), fields[-1].strip(), [f"wavs/{fields[0].strip()}.wav"], at=at
            )


FORMAT = LJSpeech()
