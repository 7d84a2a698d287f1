"""Ming-UniAudio JSON lines: one object a line, `task_type` asr, tts or edit.

    {"task_type": "asr", "wav_path": "a.wav", "text": "hello", "lang": "en", "id": "optional"}
    {"task_type": "edit", "prompt_wav_path": "a.wav", "target_wav_path": "b.wav",
     "text": "Delete the word old.", "target_text": "hello"}

asr: the clip is read, the text answered (`lang` goes before it). tts: the text is read, the clip
answered. edit: of one clip another is made, as the text says; `target_text` (optional) is what is
said in it, which is written before it is spoken. task_type is written in any case, and may be left
out where the source has a task. Clips are paths by the rule of raysft.paths; a relative one begins
at the folder of the file.
Other fields are metadata, or refused: see fields.py. A source is one file.
"""

from __future__ import annotations

from pathlib import Path

from raysft import stores
from raysft.data.example import Audio, Example
from raysft.data.sources import json_lines
from raysft.data.sources.base import Split, clip_path, id_field, kind, load_record, text_field
from raysft.data.sources.fields import refuse_unread, stated_seconds
from raysft.errors import BadExample, UserError
from raysft.json_types import JsonObject

TASKS = ("asr", "tts", "edit")
READ = frozenset(["task_type", "wav_path", "text", "lang", "id"])
EDITS = frozenset(["task_type", "prompt_wav_path", "target_wav_path", "text", "target_text", "id"])


class MingJsonl(json_lines.JsonLines):
    """The format `ming_jsonl`."""

    name = "ming_jsonl"
    describe = (
        "JSON lines with task_type (asr, tts, edit; or the entry's task says it), wav_path (edit: "
        "prompt_wav_path, target_wav_path), text"
    )

    def sniff(self, path: Path) -> bool:
        """Whether one of the first lines is an object with task_type or a clip of Ming's."""
        if stores.is_dir(path):
            return False
        for record in json_lines.first_objects(path):
            item = "output" in record and ("instruction" in record or "input" in record)
            own = "task_type" in record or "prompt_wav_path" in record
            if "wav_path" in record or (own and not item):
                return True
        return False

    def files(self, path: Path, split: Split) -> list[Path]:
        """The file itself. A folder is refused: which of its files are for training?"""
        if stores.is_dir(path):
            names = sorted(entry.name for entry in path.glob("*.jsonl"))[:5]
            raise UserError(
                f"{path} is a folder, and format {self.name} reads files: give each file its own "
                f"entry (found: {', '.join(names) or 'no .jsonl file'})"
            )
        return [path]

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of one line. Raises BadExample naming what is wrong with it."""
        record = load_record(raw)
        # `task: tts` makes tts of asr lines; any other name only renames what the line says.
        shape = task if task in TASKS else record.get("task_type")
        shape = shape.strip().lower() if isinstance(shape, str) else shape
        if shape not in TASKS:
            found = repr(shape) if isinstance(shape, str) else kind(shape)
            missing = "" if shape is not None else "; or set the entry's task to one of these"
            raise BadExample(
                f"task_type is {found}; supported: {', '.join(TASKS)}{missing}", "malformed record"
            )
        text = text_field(record, "text")
        if not text.strip():
            raise BadExample("field 'text' is empty", "malformed record")
        if shape == "edit":
            return self._edit(record, text, file, line, task)
        given = text_field(record, "wav_path")
        path = _clip(record, "wav_path", file)
        lang = record.get("lang")
        if lang is not None and not isinstance(lang, str):
            raise BadExample(f"field 'lang' is {kind(lang)}, expected a text", "malformed record")
        refuse_unread(record, READ, clip=given)
        clip = Audio(path, stated_seconds(record.get("duration")))
        asr = shape == "asr"
        return Example(
            id=id_field(record, file, line),
            task=task or shape,
            input=(clip,) if asr else (text,),
            output=(text,) if asr else (clip,),
            lang=(lang or None) if asr else None,
            text=text,
            language=None if asr else lang or None,
        )

    def _edit(
        self, record: JsonObject, text: str, file: Path, line: int, task: str | None
    ) -> Example:
        heard, spoken = (_clip(record, f"{which}_wav_path", file) for which in ("prompt", "target"))
        transcript = text_field(record, "target_text") if "target_text" in record else ""
        refuse_unread(record, EDITS, clip=record["target_wav_path"])
        said = (transcript,) if transcript.strip() else ()
        return Example(
            id=id_field(record, file, line),
            task=task or "edit",
            input=(Audio(heard), text),
            output=(*said, Audio(spoken)),
            text=transcript or None,
        )


def _clip(record: JsonObject, name: str, file: Path) -> str:
    """The path of a clip. Raises BadExample naming the field."""
    given = text_field(record, name)
    try:
        return clip_path(given, file)
    except BadExample as error:
        raise BadExample(f"field '{name}': {error}", "malformed record") from None


FORMAT = MingJsonl()
