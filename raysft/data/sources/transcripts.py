"""A clip (or several) and what is said in it: the example that most corpora's records are."""

from __future__ import annotations

from collections.abc import Sequence

from raysft.data.example import Audio, Example
from raysft.errors import BadExample

TASKS = ("asr", "tts")


def transcript(
    name: str,
    clips: Sequence[Audio],
    text: str,
    task: str | None,
    speaker: str | None = None,
    tags: frozenset[str] = frozenset(),
    language: str | None = None,
) -> Example:
    """asr: the clips are heard, the text answered. tts: the text is read, the clips answered; any
    other task is asr under its name. Raises BadExample where one of them is missing.

    tags: words that say a record is none to learn from, where they are all its text.
    """
    if not text.strip():
        raise BadExample("its text is empty", "malformed record")
    if tags and set(text.split()) <= tags:
        raise BadExample(f"its text is {text.strip()}: nothing that is said", "malformed record")
    if not clips:
        raise BadExample("it has no clip", "malformed record")
    spoken = task == "tts"
    return Example(
        id=name,
        task=task or "asr",
        input=(text,) if spoken else tuple(clips),
        output=tuple(clips) if spoken else (text,),
        text=text,
        speaker=speaker,
        language=language,
    )
