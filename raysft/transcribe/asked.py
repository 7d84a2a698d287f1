"""What is to be transcribed: files, folders and manifests of a command line, as examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from raysft import paths
from raysft.config.schema import Source
from raysft.data import sources
from raysft.data.example import Audio, Example
from raysft.data.facts import reference_of
from raysft.data.sources import causes, json_lines
from raysft.data.sources.base import Located
from raysft.errors import UserError

# Files of these names are clips of a folder; a file that is named itself may have any.
SUFFIXES = {
    *(".wav", ".wave", ".w64", ".rf64", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".sph"),
    *(".nist", ".flac", ".ogg", ".oga", ".opus", ".mp2", ".mp3", ".mpga", ".m4a", ".mp4", ".aac"),
    *(".webm", ".mka", ".amr", ".wma", ".spx"),
}
TTS = "tts"


@dataclass(frozen=True)
class Asked:
    """A clip, or an example of a manifest. path: of its clip, as it was named. source: the file or
    folder that named it. example: None where there is none, for the reason in `error`."""

    path: str
    id: str
    source: str
    example: Example | None = None
    error: str = ""

    @property
    def reference(self) -> str | None:
        """What a manifest says is right; of a clip nothing is known."""
        return None if self.example is None else reference_of(self.example)


@dataclass(frozen=True)
class Wishes:
    """How it is asked. prompt: the instruction, in place of an example's own; lang: of those that
    say none; task: in place of the manifest's, and of clips (asr where it is left out)."""

    prompt: str | None = None
    lang: str | None = None
    task: str | None = None


def read(audio: Iterable[str | Path], wishes: Wishes) -> list[Asked]:
    """All that the words of a command line name, in their order.

    A file is a clip, or a manifest of any format that sources have; a folder is the clips below it,
    by name, or a source. Raises UserError for a manifest in no known format, a folder without a
    clip, and where nothing is asked. A clip that is not there is named when it is read.
    """
    if wishes.task == TTS:
        raise UserError(_SPOKEN)
    found = [one for word in audio for one in _named(str(word), wishes)]
    if not found:
        raise UserError("AUDIO: nothing to transcribe; name files, folders or a manifest")
    return found


_SPOKEN = (
    "task tts: its answers are speech, which synthesize gives (jobs/synthesize.py); transcribe "
    "answers in text"
)


def _named(word: str, wishes: Wishes) -> Iterator[Asked]:
    place = paths.argument(word, "AUDIO")
    if place.is_dir():
        clips = sorted(file for file in place.rglob("*") if _is_clip(file, place))
        if not clips:
            yield from _manifest(word, place, wishes)
        for file in clips:
            yield _clip(str(Path(word) / file.relative_to(place)), str(file), place.name, wishes)
    elif place.suffix.lower() in SUFFIXES or not place.is_file() or _is_binary(place):
        yield _clip(word, str(place), place.parent.name, wishes)
    else:
        yield from _manifest(word, place, wishes)


def _is_clip(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()


def _is_binary(place: Path) -> bool:
    """Whether a file is no text, and of no format that reads others."""
    if not causes.binary(json_lines.head(place)):
        return False
    return not any(form.sniff(place) for form in sources.formats().values() if not form.text)


def _clip(shown: str, path: str, source: str, wishes: Wishes) -> Asked:
    task = wishes.task or "asr"
    example = Example(shown, task, (Audio(path),), (), wishes.prompt, wishes.lang)
    return Asked(shown, shown, source, example)


def _manifest(word: str, place: Path, wishes: Wishes) -> Iterator[Asked]:
    source = sources.resolve(Source(path=str(place), task=wishes.task), "eval", "AUDIO")
    for file in source.files:
        for item in sources.scan(source, file):
            yield _item(item, word, source.name, wishes)


def _item(item: Located, word: str, source: str, wishes: Wishes) -> Asked:
    example = item.example
    if example is None:
        return Asked(word, item.id, source, error=item.error or "")
    clips = example.audio()
    path = clips[0].path if clips else word
    if example.task == TTS:
        return Asked(path, item.id, source, error=f"{example.id}: {_SPOKEN}")
    if wishes.prompt is not None:
        if example.turns:
            raise UserError(
                f"--prompt: {word} holds conversations ({example.id}), which say what is asked; "
                "leave it out"
            )
        example = replace(example, instruction=wishes.prompt)
    if example.lang is None and wishes.lang is not None:
        example = replace(example, lang=wishes.lang)
    return Asked(path, item.id, source, example)
