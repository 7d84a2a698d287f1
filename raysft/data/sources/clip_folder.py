"""A folder of clips, each with its text beside it; folders in it are speakers.

SPK/clip.wav   SPK/clip.txt (or lab, trans, text)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources.base import Split, folder_of
from raysft.data.sources.fields import names_audio_file
from raysft.data.sources.folders import some_files
from raysft.data.sources.layout import Layout, below, below_all, fault, listed
from raysft.data.sources.lines import lines
from raysft.json_types import JsonObject

_FIRST = 200  # clips
_TEXTS = (".txt", ".lab", ".trans", ".text")


class ClipFolder(Layout):
    """The format `clip_folder`: a source is a folder of clips, each with its text beside it."""

    name = "clip_folder"
    rank = 2
    describe = "a folder of clips with their texts beside them: SPK/clip.wav and SPK/clip.txt"

    def sniff(self, path: Path) -> bool:
        """Whether one of the first clips has a text beside it."""
        if not stores.is_dir(path):
            return False
        clips = [file for file in some_files(path) if names_audio_file(file.name)]
        return any(_text_of(clip) is not None for clip in clips[:_FIRST])

    def files(self, path: Path, split: Split) -> list[Path]:
        """The folder."""
        return [path]

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """Files may have come: it is always listed."""
        return None

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A clip each; the first folder on the way to it is its speaker, else what is before the
        first `_` of its name."""
        folder = folder_of(file)
        for clip in below_all(file):
            if clip.name.startswith(".") or not names_audio_file(clip.name):
                continue
            path = below(str(clip), folder)
            inner = PurePosixPath(below(str(clip), str(file))).parts
            text = _text_of(clip)
            if text is None:
                yield fault(clip.stem, "has no text beside it (txt, lab, trans, text)", path)
                continue
            said = " ".join(line.strip() for _, line in lines(text))
            head, bar, _ = clip.stem.partition("_")
            speaker = inner[0] if len(inner) > 1 else head if bar else None
            own = "_".join((*inner[:-1], clip.stem))
            yield listed(own, said, [path], speaker=speaker, at=path)


def _text_of(clip: Path) -> Path | None:
    places = (clip.with_suffix(end) for lower in _TEXTS for end in (lower, lower.upper()))
    return next((text for text in places if stores.is_file(text)), None)


FORMAT = ClipFolder()
