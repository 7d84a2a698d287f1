"""Why a file is in no format that is read: what it is instead, and what a user can do about it.

Looks at a file's head only. `binary` is asked of every data file; `foreign` where no format fits.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from raysft.data.sources.base import BOM
from raysft.data.sources.fields import refuse_unread
from raysft.data.sources.json_errors import explain
from raysft.errors import BadExample
from raysft.json_types import JsonObject

HEAD = 1 << 16

# How files begin that people give, and what they are.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x00\x00\xfe\xff", "UTF-32 text"),
    (b"\xff\xfe\x00\x00", "UTF-32 text"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bzip2"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"SQLite format 3\x00", "SQLite"),
    (b"\x89HDF\r\n", "HDF5"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"RIFF", "audio"),
    (b"RF64", "audio"),
    (b"fLaC", "audio"),
    (b"OggS", "audio"),
    (b"ID3", "audio"),
    (b"FORM", "audio"),
    (b"version https://git-lfs.github.com/spec", "a Git LFS pointer, not the file itself"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
)
_LISTS = (".csv", ".tsv", ".jsonl", ".json", ".list")
_UNPACK = {"gzip": "gunzip", "zstd": "zstd -d", "xz": "unxz", "bzip2": "bunzip2"}

# Other programs' records: fields that tell them, whose they are, and what to do.
_RECORDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("prompt", "response"), "pairs", "name them instruction and output, with an empty input"),
    (("prompt", "completion"), "pairs", "name them instruction and output, with an empty input"),
)

# Formats' names that people give, and what is near.
FORMATS = {
    "ming": "ming_jsonl",
    "jsonl": "ming_jsonl, or most_json for items with instruction, input and output",
    "json": "most_json, or ming_jsonl for lines with wav_path and text",
    "most": "most_json",
    "alpaca": "most_json (instruction, input, output)",
    "espnet": "kaldi",
    "shar": "lhotse",
    "tar": "webdataset",
    "csv": "table",
    "tsv": "table",
    "common_voice": "table",
    "commonvoice": "table",
    "huggingface": "parquet",
    "hf": "parquet",
    "arrow": "parquet",
    "audiofolder": "clips_jsonl, or table for metadata.csv",
    "step": "clips_jsonl",
}


def binary(head: bytes) -> str:
    """What a file with this head is, and the remedy, where it cannot be text in UTF-8; else ""."""
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return _said(what)
    if head[257:262] == b"ustar":
        return _said("a tar archive")
    if head[:2] in (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"):
        return _said("audio")
    if b"\0" in head[:4096]:
        start = head[: min(len(head), 4096) // 4 * 4]
        for code in ("UTF-32LE", "UTF-32BE"):  # without a mark
            text = start.decode(code, "replace")
            if all(c in "\r\n\t" or (c.isprintable() and c != "\ufffd") for c in text):
                return _said(f"{code} text")
        even, odd = head[:4096:2].count(0), head[1:4096:2].count(0)
        half = min(len(head), 4096) / 2
        if max(even, odd) > 0.4 * half > 3 * min(even, odd):  # ASCII in two bytes, without a mark
            return _said("UTF-16 text")
        return "a binary file, expected text in UTF-8"
    return ""


def _said(what: str) -> str:
    if what.startswith("UTF-"):
        code = what.split()[0]
        return f"{what}, expected UTF-8: iconv -f {code} -t UTF-8 FILE > NEW converts it"
    if what in _UNPACK:
        return f"packed by {what}: unpack it ({_UNPACK[what]})"
    if what == "audio":
        return "an audio file: data files list clips, a line each"
    if what.startswith("a Git LFS"):
        return f"{what}: git lfs pull fetches it"
    return f"{what}, which is not read: write its rows as JSON lines"


def foreign(path: Path, head: bytes) -> str:
    """What a text file in no format seems to be, and what a user can do; "" where nothing shows."""
    text = head.removeprefix(BOM).decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return "it holds nothing but white space"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # it may be cut inside a character
    except UnicodeDecodeError as error:
        return (
            f"its text is not in UTF-8 (byte {error.start}): iconv -f CODE -t UTF-8 FILE > NEW "
            "converts it, where CODE is its encoding (LATIN1, GB18030, ...)"
        )
    if b"\n" not in head and len(head.strip().split(b"\r")) > 1:
        return "its lines end with \\r alone, expected \\n: tr '\\r' '\\n' < FILE > NEW converts it"
    if len(head) >= HEAD and len(lines) == 1 and not text.lstrip().startswith(("{", "[")):
        return f"its first line is longer than {HEAD >> 10} KiB and is no JSON"
    record = _first_record(text, lines)
    if record is not None and ("wav_path" in record or "task_type" in record):
        way = ".[]" if text.lstrip().startswith("[") else "."
        return (
            "its records are those of ming_jsonl, but that has each on a line of its own: "
            f"jq -c '{way}' FILE > NEW writes them so"
        )
    if record is not None:
        return _of_fields(record)
    if text.lstrip().startswith(("{", "[")):
        return _broken(text, len(head) >= HEAD)
    return _of_table(path, lines)


def folder(names: list[str]) -> str:
    """What a user can do about a folder in no format, by the names in it; "" where none tells."""
    lists = [name for name in names if name.lower().removesuffix(".gz").endswith(_LISTS)]
    if not lists:
        return ""
    return f"name the file that lists its examples ({', '.join(lists[:5])}) instead of the folder"


def _first_record(text: str, lines: list[str]) -> JsonObject | None:
    for line in lines[:20]:
        try:
            found = json.loads(line.strip().rstrip(","))
        except (ValueError, RecursionError):
            continue
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, dict):
            return found
    start = text.find("{")
    if start < 0 or text[:start].strip() not in ("", "["):
        return None
    try:
        found, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _of_fields(record: JsonObject) -> str:
    names = ", ".join(list(record)[:8]) or "none"
    for wanted, whose, remedy in _RECORDS:
        if all(name in record for name in wanted):
            try:
                refuse_unread(record, frozenset(wanted) | _HANDLED)
            except BadExample as error:
                remedy += f" (mind that {error})"
            return f"it looks like {whose} (fields {names}): {remedy}"
    clip = next((name for name in _CLIPS if isinstance(record.get(name), str)), None)
    said = next((name for name in _TEXTS if isinstance(record.get(name), str)), None)
    if clip is not None and said is None:
        return (
            f"its records name a clip ({clip}) and have no text under a name that is known "
            f"({', '.join(_TEXTS)}); their fields: {names}"
        )
    if said is not None and clip is None:
        return (
            f"its records have a text ({said}) and name no clip under a name that is known "
            f"({', '.join(_CLIPS)}); their fields: {names}"
        )
    return f"its records have the fields {names}"


_CLIPS = ("wav", "audio_filepath", "audio_path", "path", "file_name", "audio", "source", "wav_path")
_TEXTS = ("text", "txt", "sentence", "transcription", "transcript", "target")
_KEYS = re.compile(r'"([^"\\\x00-\x1f]{1,40})"\s*:')
_HANDLED = frozenset(["messages", "conversations", "conversation", "recording", "supervisions"])


def _broken(text: str, cut: bool) -> str:
    """What is wrong with a text that begins like JSON. cut: more follows it in the file."""
    try:
        json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except RecursionError:
        return "its JSON is nested too deeply"
    except json.JSONDecodeError as error:
        # A literal or an escape that was cut is found wrong at its beginning.
        if cut and (error.msg.startswith("Unterminated") or error.pos > len(text) - 12):
            names = list(dict.fromkeys(_KEYS.findall(text)))[:8]
            return (
                f"it begins like JSON, and its first {HEAD >> 10} KiB hold no whole record that "
                f"is known (fields seen: {', '.join(names) or 'none'})"
            )
        return f"it begins like JSON, but {explain(error, text)}"
    except ValueError as error:
        return f"it begins like JSON, but {error}"
    return "its JSON holds no records"


def _of_table(path: Path, lines: list[str]) -> str:
    for mark, name in (("\t", "tabs"), (",", "commas"), ("|", "bars"), (";", "semicolons")):
        counts = [line.count(mark) for line in lines[:20]]
        if counts[0] and len(lines) > 1 and min(counts) >= 1:
            columns = next(csv.reader(lines[:1], delimiter=mark))
            shown = ", ".join(column.strip()[:30] for column in columns[:6])
            remedy = (
                "say which are the clip's and the text's (format: table, columns: {audio: NAME, "
                "text: NAME})"
                if mark in "\t,"
                else "write it with tabs or commas (format table)"
            )
            return (
                f"it looks like a table with {name} between its columns ({shown}): {remedy}, or "
                "write its rows as JSON lines"
            )
    first = lines[0].split()
    if len(first) > 1 and ("/" in first[1] or path.name in ("wav.scp", "text", "utt2spk")):
        return "it looks like a list of Kaldi's: name the folder, with its wav.scp and text"
    if path.suffix.lower() in (".yaml", ".yml"):
        return "it is YAML, not data: name the files with examples"
    return ""


def near_format(name: str, known: Iterable[str]) -> str:
    """What may have been meant by a format there is not; the end of a message."""
    if (meant := FORMATS.get(name.strip().lower())) is not None:
        return f"; near is {meant}"
    near = difflib.get_close_matches(name, [*known, "auto"], 1)
    return f"; did you mean {near[0]}?" if near else ""
