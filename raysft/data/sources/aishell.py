"""AISHELL-1's folder: transcripts of words, and clips by split and speaker.

transcript/aishell_transcript_v0.8.txt   BAC009S0002W0122 而 对 楼市
wav/train/S0002/BAC009S0002W0122.wav
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources.base import Split, folder_of
from raysft.data.sources.layout import Layout, below, below_all, fault, listed
from raysft.data.sources.lines import lines
from raysft.errors import UserError
from raysft.json_types import JsonObject


class Aishell(Layout):
    """The format `aishell`: a source is the folder, or one split of it (wav/train)."""

    name = "aishell"
    describe = "AISHELL-1's folder: transcript/*.txt and wav/SPLIT/SPK/; or one of wav's splits"

    def sniff(self, path: Path) -> bool:
        """Whether there is a transcript of it."""
        return (
            stores.is_dir(path)
            and self._transcripts(path) is not None
            and self._wav(path) is not None
        )

    def files(self, path: Path, split: Split) -> list[Path]:
        """The folder; of a whole corpus the split `train`, or `test` for evaluation."""
        wav = self._wav(path)
        if wav is None or self._transcripts(path) is None:
            raise UserError(f"{path} has no wav/ and transcript/ as AISHELL-1 has")
        if wav == path:
            return [path]
        found = wav / ("train" if split == "train" else "test")
        if not stores.is_dir(found):
            raise UserError(f"{path} has no {found}: name one of the folders in {wav}")
        return [found]

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """The transcripts; clips may have come, so that it is always listed."""
        return None

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A clip each; blanks between words are not said in Chinese, and taken out."""
        texts: dict[str, str] = {}
        for transcript in self._transcripts(file) or ():
            for _, line in lines(transcript):
                name, *words = line.split()
                texts[name] = "".join(words)
        folder = folder_of(file)
        for clip in below_all(file):
            if clip.suffix.lower() != ".wav":
                continue
            path = below(str(clip), folder)
            if clip.stem not in texts:
                yield fault(clip.stem, "has no line in transcript/", path)
                continue
            yield listed(clip.stem, texts[clip.stem], [path], speaker=clip.parent.name, at=path)

    def _wav(self, path: Path) -> Path | None:
        if stores.is_dir(path / "wav"):
            return path / "wav"
        return path if path.parent.name == "wav" else None

    def _transcripts(self, path: Path) -> list[Path] | None:
        for folder in (path, path.parent.parent):
            if found := sorted((folder / "transcript").glob("*.txt")):
                return found
        return None


FORMAT = Aishell()
