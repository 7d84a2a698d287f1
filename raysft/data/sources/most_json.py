"""MoST instruction JSON: a list of items, {"data": [...]}, one item, or JSON lines of items.

    {"id": "a", "instruction": "Transcribe ...", "input": "[Hu7][Hu90]", "output": "HELLO",
     "metadata": {"task": "optional"}}

Speech is written as units `[Hu7]` in the input or output. The task is metadata.task, or the item's
own `task` or `task_type`, where given (they must not differ), else tts if the output holds units,
asr if only the input does, else text. Alpaca items are such items, also without an input. Other
fields are metadata, or refused: see fields.py. In a folder, train files are `*train*.json` and
evaluation files `*dev*.json` or `*valid*.json`.
"""

from __future__ import annotations

import re
from pathlib import Path

from raysft import stores
from raysft.data.example import Example, Part, Units
from raysft.data.sources import json_lines
from raysft.data.sources.base import Split, id_field, kind, load_record, text_field
from raysft.data.sources.fields import METADATA, refuse_placeholders, refuse_unread
from raysft.data.sources.json_files import JsonFiles
from raysft.errors import BadExample, UserError
from raysft.json_types import JsonObject

TASK_FIELDS = ("task", "task_type")
READ = frozenset(["id", "instruction", "input", "output", *TASK_FIELDS])
PATTERNS: dict[Split, tuple[str, ...]] = {"train": ("train",), "eval": ("dev", "valid")}

_KEY = re.compile(rb'"(?:instruction|input|output|data)"\s*:')
# White space between two units is layout; nine digits: longer numbers are no unit.
_RUN = re.compile(r"(\[Hu[0-9]{1,9}\](?:\s*\[Hu[0-9]{1,9}\])*)")


class MostJson(JsonFiles):
    """The format `most_json`."""

    name = "most_json"
    describe = (
        "JSON (or JSON lines) of items with instruction, input, output and [Hu7] units, or a "
        "folder of such"
    )

    def sniff(self, path: Path) -> bool:
        """Whether the file's head is a list or an object with MoST's keys (folder: any file's)."""
        if stores.is_dir(path):
            return any(self.sniff(file) for file in _json_files(path))
        start = b"\n".join(json_lines.first_lines(path)).lstrip()
        return start[:1] in (b"[", b"{") and (
            _KEY.search(start) is not None or start[1:].lstrip()[:1] == b"]"
        )

    def files(self, path: Path, split: Split) -> list[Path]:
        """The file itself, or a folder's files of this split, sorted by name; for training all of
        them, where no name says a split."""
        if not stores.is_dir(path):
            return [path]
        found = {
            name: [file for file in _json_files(path) if any(p in file.name.lower() for p in part)]
            for name, part in PATTERNS.items()
        }
        both = sorted(set(found["train"]) & set(found["eval"]))
        if both:
            raise UserError(
                f"{path}: {both[0].name} matches the names of both train and evaluation files; "
                "give the files their own entries instead of the folder"
            )
        if split == "train" and not any(found.values()) and (every := _json_files(path)):
            return every
        if not found[split]:
            wanted = " or ".join(f"*{part}*.json" for part in PATTERNS[split])
            there = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
            raise UserError(f"{path} has no file named {wanted}; found in it: {there}")
        return found[split]

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of one item. Raises BadExample naming what is wrong with it."""
        record = load_record(raw)
        refuse_unread(record, READ)
        if record.get("instruction") and "input" not in record:
            record["input"] = ""  # Alpaca's, where the instruction says it all
        for name in ("instruction", "input", "output"):
            if isinstance(record.get(name), str):
                refuse_placeholders(record[name], name)
        source = split_units(text_field(record, "input"), "input")
        target = split_units(text_field(record, "output"), "output")
        if not target:
            raise BadExample("field 'output' is empty", "malformed record")
        instruction = record.get("instruction")
        if instruction is not None and not isinstance(instruction, str):
            raise BadExample(
                f"field 'instruction' is {kind(instruction)}, expected a text", "malformed record"
            )
        if not instruction and not source:
            raise BadExample("fields 'instruction' and 'input' are both empty", "malformed record")
        task = task or _task(record, source, target)
        spoken = {"asr": target, "tts": source}.get(task, ())
        return Example(
            id=id_field(record, file, line),
            task=task,
            input=source,
            output=target,
            instruction=instruction,
            text=spoken[0] if len(spoken) == 1 and isinstance(spoken[0], str) else None,
        )


def split_units(field: str, name: str = "field") -> tuple[Part, ...]:
    """Text and runs of `[Hu7]` units, in order; () for blank. Raises BadExample on "[Hu7" cut off.

    A text without units stays as it is; beside units, pieces of white space alone are dropped.
    """
    if "[Hu" not in field:
        return (field,) if field.strip() else ()
    parts: list[Part] = []
    for number, piece in enumerate(_RUN.split(field)):
        if number % 2:
            numbers = "".join(piece.split())[len("[Hu") : -len("]")].split("][Hu")
            parts.append(Units(tuple(map(int, numbers))))
        elif "[Hu" in piece:
            near = piece[piece.index("[Hu") :][:20]
            raise BadExample(
                f"field {name!r} holds a malformed unit near {near!r}", "malformed record"
            )
        elif piece.strip():
            parts.append(piece)
    return tuple(parts)


def _task(record: JsonObject, source: tuple[Part, ...], target: tuple[Part, ...]) -> str:
    metadata = record.get(METADATA)
    if metadata is not None and not isinstance(metadata, dict):
        raise BadExample(
            f"field 'metadata' is {kind(metadata)}, expected an object", "malformed record"
        )
    places = {"metadata.task": (metadata or {}).get("task")}
    places |= {name: record.get(name) or None for name in TASK_FIELDS}
    given: dict[str, str] = {}
    for name, value in places.items():
        if value is None:
            continue
        if not isinstance(value, str) or not value.strip():
            raise BadExample(f"field {name!r} is not a text", "malformed record")
        # Published sets write ASR and asr alike; data.prompts, data.mix and WER know one name.
        given[name] = value.strip().lower()
    if len(set(given.values())) > 1:
        said = ", ".join(f"{name!r} says {value!r}" for name, value in given.items())
        raise BadExample(
            f"field {said}: leave one of them, or set the entry's task", "malformed record"
        )
    if given:
        return next(iter(given.values()))
    if any(isinstance(part, Units) for part in target):
        return "tts"
    return "asr" if any(isinstance(part, Units) for part in source) else "text"


def _json_files(folder: Path) -> list[Path]:
    """Its visible regular .json files (`._a.json` and the like are not data)."""
    return sorted(
        file
        for file in folder.glob("*.json")
        if stores.is_file(file) and not file.name.startswith(".")
    )


FORMAT = MostJson()
