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
from raysft.data.sources.fields import names_audio_file
from raysft.data.sources.folders import some_files
from raysft.data.sources.layout import Layout, below, below_all, fault, listed
from raysft.data.sources.lines import lines
from raysft.json_types import JsonObject


class LibriSpeech(Layout):
    """The format `librispeech`: a source is a folder with *.trans.txt files somewhere below it."""

    name = "librispeech"
    describe = "LibriSpeech's folders: SPK/CHAPTER/*.trans.txt and clips beside them"

    def sniff(self, path: Path) -> bool:
        """Whether there is a transcript at one of the places it may be at."""
        return stores.is_dir(path) and any(
            file.name.endswith(".trans.txt") for file in some_files(path)
        )

    def files(self, path: Path, split: Split) -> list[Path]:
        """The folder: all transcripts below it are one listing."""
        return [path]

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """The transcripts, and the folders of clips, which may have come."""
        if stores.is_remote(file):
            return None
        found = transcripts(file)
        return [*found, *sorted({one.parent for one in found})]

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A line of a transcript each."""
        for transcript in transcripts(file):
            there: dict[str, str] = {}
            for one in sorted(transcript.parent.iterdir()):
                if names_audio_file(one.name) and not one.name.startswith("."):
                    there.setdefault(one.stem, one.name)  # a flac before a wav
            silent = dict(there)
            folder = below(str(transcript.parent), folder_of(file))
            for number, line in lines(transcript):
                name, text = [*line.split(maxsplit=1), ""][:2]
                silent.pop(name, None)
                at = f"{transcript.name}:{number}"
                if name not in there:
                    yield fault(name, f"no clip {name}.flac beside its transcript", at)
                    continue
                clip = f"{folder}/{there[name]}"
                yield listed(name, text.strip(), [clip], speaker=name.split("-")[0], at=at)
            for name, clip in silent.items():
                yield fault(name, f"has no line in {transcript.name}", f"{folder}/{clip}")


def transcripts(folder: Path) -> list[Path]:
    """All below a folder, in a fixed order."""
    return [one for one in below_all(folder) if one.name.endswith(".trans.txt")]


FORMAT = LibriSpeech()
