"""LibriSpeech's folders, and those made like them (LibriTTS's are not).

SPK/CHAPTER/SPK-CHAPTER.trans.txt   SPK-CHAPTER-0001 HELLO THERE
SPK/CHAPTER/SPK-CHAPTER-0001.flac
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources.base import Split, folder_of
from raysft.data.sources.layout import Layout, below, fault, listed
from raysft.data.sources.lines import lines
from raysft.json_types import JsonObject

_CLIPS = (".flac", ".wav", ".mp3", ".opus", ".ogg", ".m4a")


class LibriSpeech(Layout):
    """The format `librispeech`: a source is a folder with *.trans.txt files somewhere below it."""

    name = "librispeech"
    describe = "LibriSpeech's folders: SPK/CHAPTER/*.trans.txt and clips beside them"

    def sniff(self, path: Path) -> bool:
        """Whether there is a transcript at one of the places it may be at."""
        return stores.is_dir(path) and any(
            next(path.glob(f"{above}*.trans.txt"), None) for above in ("", "*/", "*/*/", "*/*/*/")
        )

    def files(self, path: Path, split: Split) -> list[Path]:
        """The folder: all transcripts below it are one listing."""
        return [path]

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """The transcripts."""
        return sorted(file.rglob("*.trans.txt"))

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A line of a transcript each."""
        for transcript in sorted(file.rglob("*.trans.txt")):
            there = {
                name.stem: name.name
                for name in transcript.parent.iterdir()
                if name.suffix in _CLIPS
            }
            folder = below(str(transcript.parent), folder_of(file))
            for number, line in lines(transcript):
                name, _, text = line.strip().partition(" ")
                at = f"{transcript.name}:{number}"
                if name not in there:
                    yield fault(name, f"no clip {name}.flac beside its transcript", at)
                    continue
                clip = f"{folder}/{there[name]}"
                yield listed(name, text, [clip], speaker=name.split("-")[0], at=at)


FORMAT = LibriSpeech()
