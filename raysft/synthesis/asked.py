"""What is to be said: texts and files of a command line, as examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from raysft.config.schema import Source
from raysft.data import scripts, sources
from raysft.data.example import ASSISTANT, Audio, Example, Turn, Units
from raysft.data.sources.fields import names_audio_file
from raysft.errors import UserError
from raysft.synthesis.run import SPOKEN, Shown, asked_of, cloned, replied

TEXTS = {".txt", ".text"}  # of files with a text a line
MANIFESTS = {".jsonl", ".json", ".tsv", ".csv", ".parquet", ".list"}  # names that no text has


def read(
    given: Iterable[str], task: str, speaker: str | None, says: str | None = None
) -> list[Example]:
    """All that the words of a command line name, in their order.

    A word is a file, where there is one of that name (a text a line, or a manifest of any format,
    of whose examples that speak the texts are said), and else what is to be said. speaker: path of
    a clip that each text is said after; says: what it says, where each text is to be said in its
    voice. With task `dialog` a word is a clip that is replied to, or a manifest. Raises UserError
    where nothing is to be said.
    """
    if says is not None and (speaker is None or not says.strip()):
        raise UserError("--speaker-text: says what the clip of --speaker does: give both")
    if speaker is not None and task == scripts.DIALOG:
        raise UserError("--speaker: task dialog replies in its decoder's own voice: leave it out")
    found: list[Example] = []

    def asked(text: str, name: str) -> Example:
        if speaker is not None and says is not None:
            return cloned(text, task, Shown(speaker, says), name)
        return asked_of(text, task, speaker, name)

    for word in given:
        path = Path(word)
        if task == scripts.DIALOG and names_audio_file(word):
            found.append(replied(str(path.absolute()), path.stem))
        elif not _is_file(path):
            alone = len(word.split()) == 1
            if alone and path.suffix.lower() in {*TEXTS, *MANIFESTS}:
                raise UserError(f"{word}: there is no such file")
            if alone and names_audio_file(word):
                raise UserError(
                    f"{word}: is the name of a clip, and no text: say --task dialog for a reply to "
                    "it, or --speaker for its voice"
                )
            if task == scripts.DIALOG:
                raise UserError(f"{word}: task dialog replies to clips, and this is none")
            found.append(asked(word, f"said_{len(found):04}"))
        elif path.suffix.lower() in TEXTS:
            if task == scripts.DIALOG:
                raise UserError(f"{word}: task dialog replies to clips, and these are texts")
            for number, line in enumerate(filter(str.strip, _lines(path))):
                found.append(asked(line.strip(), f"{path.stem}_{number:04}"))
        else:
            found += _of_manifest(path, task, speaker, asked)
    if not found:
        raise UserError("nothing is to be said: give texts, or files that hold some")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 at byte {error.start}: write it anew") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text that is too long for a name
        return False


def _of_manifest(
    path: Path, task: str, speaker: str | None, asked: Callable[[str, str], Example]
) -> list[Example]:
    source = sources.resolve(Source(path=str(path)), "eval", "TEXT")
    found = []
    for file in source.files:
        for item in sources.scan(source, file):
            if item.example is None:
                raise UserError(f"{path}: {item.id}: {item.error}")
            if _speaks(item.example):
                if speaker is not None:
                    raise UserError(
                        f"--speaker: {path} says itself what is heard before {item.id}: leave it "
                        "out, or give the texts"
                    )
                found.append(_to_be_said(item.example))
            elif task == scripts.DIALOG:
                raise UserError(
                    f"{path}: {item.id}: task dialog replies to dialogs, and this is none"
                )
            elif item.example.text:  # what it says may be said, whatever it was written for
                found.append(asked(item.example.text, item.id))
    if not found:
        raise UserError(f"{path}: none of its examples has a text to be said")
    return found


def _speaks(example: Example) -> bool:
    """Whether it is an example of speaking: of a text, of units, or by a script."""
    if example.script:
        return True
    units = any(isinstance(part, Units) for part in example.input)
    return units or any(isinstance(part, Audio) for part in example.output)


def _to_be_said(example: Example) -> Example:
    """Of a script what is given: what it says is the model's to say."""
    if example.script == scripts.DIALOG:
        return replace(example, turns=example.turns[:1])
    if not example.script:
        return example
    turns = tuple(turn for turn in example.turns if turn.role != ASSISTANT)
    user = next(turn for turn in turns if turn.role == "user")
    return replace(example, turns=(*turns, Turn(ASSISTANT, (SPOKEN,))), text=user.text)
