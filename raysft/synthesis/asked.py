"""What is to be said: texts and files of a command line, as examples."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from raysft.config.schema import Source
from raysft.data import sources
from raysft.data.example import Audio, Example, Units
from raysft.errors import UserError
from raysft.synthesis.run import asked_of

TEXTS = {".txt", ".text"}  # of files with a text a line


def read(given: Iterable[str], task: str, speaker: str | None) -> list[Example]:
    """All that the words of a command line name, in their order.

    A word is a file, where there is one of that name (a text a line, or a manifest of any format,
    of whose examples that speak the texts are said), and else what is to be said. speaker: path of
    a clip that each text is said after. Raises UserError where nothing is to be said.
    """
    found: list[Example] = []
    for word in given:
        path = Path(word)
        if not _is_file(path):
            found.append(asked_of(word, task, speaker, f"said_{len(found):04}"))
        elif path.suffix.lower() in TEXTS:
            lines = path.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(filter(str.strip, lines)):
                found.append(asked_of(line.strip(), task, speaker, f"{path.stem}_{number:04}"))
        else:
            found += _of_manifest(path, task, speaker)
    if not found:
        raise UserError("nothing is to be said: give texts, or files that hold some")
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text that is too long for a name
        return False


def _of_manifest(path: Path, task: str, speaker: str | None) -> list[Example]:
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
                found.append(item.example)
            elif item.example.text:  # what it says may be said, whatever it was written for
                found.append(asked_of(item.example.text, task, speaker, item.id))
    if not found:
        raise UserError(f"{path}: none of its examples has a text to be said")
    return found


def _speaks(example: Example) -> bool:
    """Whether it is an example of speaking: of a text, or of units."""
    units = any(isinstance(part, Units) for part in example.input)
    return units or any(isinstance(part, Audio) for part in example.output)
