"""Ming-UniAudio JSON lines: one object a line, `task_type` asr or tts.

    {"task_type": "asr", "wav_path": "a.wav", "text": "hello", "lang": "en", "id": "optional"}

asr: the clip is read, the text answered (`lang` goes before it). tts: the text is read, the clip
answered. `wav_path` is absolute, or relative to the folder of the file. A source is one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from raysft.data.example import Audio, Example
from raysft.data.sources import json_lines
from raysft.data.sources.base import (
    BOM,
    Chunk,
    Item,
    Split,
    Survey,
    id_field,
    kind,
    load_record,
    text_field,
)
from raysft.errors import BadExample, UserError

TASKS = ("asr", "tts")


class MingJsonl:
    """The format `ming_jsonl`."""

    name = "ming_jsonl"
    describe = "a file of JSON lines with task_type, wav_path, text"
    noun = "line"

    def sniff(self, path: Path) -> bool:
        """Whether one of the first lines is an object with task_type or wav_path.

        Not only the first: a broken line costs that line, not the format's recognition.
        """
        if path.is_dir():
            return False
        for line in json_lines.head(path).removeprefix(BOM).split(b"\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and ("task_type" in record or "wav_path" in record):
                return True
        return False

    def files(self, path: Path, split: Split) -> list[Path]:
        """The file itself. A folder is refused: which of its files are for training?"""
        if path.is_dir():
            names = sorted(entry.name for entry in path.glob("*.jsonl"))[:5]
            raise UserError(
                f"{path} is a folder, and format {self.name} reads files: give each file its own "
                f"entry (found: {', '.join(names) or 'no .jsonl file'})"
            )
        return [path]

    def survey(self, file: Path) -> Survey:
        """Hash and chunks, cut between lines."""
        return json_lines.survey(file)

    def items(self, file: Path, chunk: Chunk | None = None) -> Iterator[Item]:
        """The lines that are not blank."""
        return json_lines.items(file, chunk)

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of one line. Raises BadExample naming what is wrong with it."""
        record = load_record(raw)
        # `task: tts` makes tts of asr lines; any other name only renames what the line says.
        shape = task if task in TASKS else record.get("task_type")
        if shape not in TASKS:
            found = repr(shape) if isinstance(shape, str) else kind(shape)
            raise BadExample(f"task_type is {found}; supported: {', '.join(TASKS)}")
        text = text_field(record, "text")
        if not text.strip():
            raise BadExample("field 'text' is empty")
        path = text_field(record, "wav_path")
        if not path or "\0" in path:
            raise BadExample("field 'wav_path' is empty or holds a NUL character")
        lang = record.get("lang")
        if lang is not None and not isinstance(lang, str):
            raise BadExample(f"field 'lang' is {kind(lang)}, expected a text")
        clip = Audio(os.path.normpath(os.path.join(os.path.abspath(file.parent), path)))
        asr = shape == "asr"
        return Example(
            id=id_field(record, file, line),
            task=task or shape,
            input=(clip,) if asr else (text,),
            output=(text,) if asr else (clip,),
            lang=(lang or None) if asr else None,
            text=text,
        )


FORMAT = MingJsonl()
