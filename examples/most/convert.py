"""Turn ASR items into TTS items: MoST instruction JSON, input and output swapped.

    python examples/most/convert.py --input_dir units --output_dir units_tts
    python examples/most/convert.py --config batch.yaml

The config is one entry, or a list of entries, with the names of the flags:

    - {input_dir: librispeech, output_dir: tts/librispeech, dataset_name: librispeech}
    - {input_dir: mls, output_dir: tts/mls, file_pattern: "*train*.json"}

Of `NAME.json` (a list of items, {"data": [...]}, one item, or an item a line) comes a list,
`NAME_tts.json`. An item `a` becomes `tts_a`, with metadata task: tts, original_task: asr and
dataset. The same input gives the same bytes. Files that this has written, and items that are no ASR
(their input holds no units, or their output does), are left out and counted. What cannot be read is
named by file and item, and nothing is written for any file then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

UNIT = "[Hu"
SUFFIX = "_tts"
INSTRUCTION = "Convert the following text into speech."
KEYS = ("input_dir", "output_dir", "dataset_name", "file_pattern", "instruction")


class Wrong(Exception):
    """What is said to the user, with the remedy."""


@dataclass(frozen=True)
class Job:
    """One folder to convert."""

    input_dir: Path
    output_dir: Path
    dataset_name: str
    file_pattern: str = "*.json"
    instruction: str = INSTRUCTION


def job(entry: dict[str, Any], where: str) -> Job:
    """The job of an entry of the config, or of the flags. Raises Wrong naming `where`."""
    if unknown := sorted(set(entry) - set(KEYS)):
        raise Wrong(f"{where}: unknown key {unknown[0]!r}; there are {', '.join(KEYS)}")
    for key in ("input_dir", "output_dir"):
        if not isinstance(entry.get(key), str):
            raise Wrong(f"{where}: {key} is missing; give the folder")
    folder = Path(entry["input_dir"])
    if not folder.is_dir():
        raise Wrong(f"{where}: input_dir {folder} is no folder")
    more = {key: entry[key] for key in ("file_pattern", "instruction") if entry.get(key)}
    name = entry.get("dataset_name") or folder.resolve().name
    return Job(folder, Path(entry["output_dir"]), str(name), **more)


def read(path: Path) -> list[Any]:
    """The items of a file, in each of its shapes. Raises Wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        try:
            found = json.loads(text)
        except ValueError as error:
            if "Extra data" not in str(error):  # else a second item, in a line of its own
                raise
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, OSError) as error:
        raise Wrong(f"{path}: cannot be read as JSON: {error}") from error
    if isinstance(found, dict):
        found = found["data"] if isinstance(found.get("data"), list) else [found]
    if not isinstance(found, list):
        raise Wrong(f'{path}: expected a list of items, {{"data": [...]}} or one item')
    return found


def converted(item: Any, job: Job, where: str) -> dict[str, Any] | None:
    """The TTS item of an ASR item; None of another. Raises Wrong naming `where`."""
    if not isinstance(item, dict):
        raise Wrong(f"{where}: expected an object, found {type(item).__name__}")
    for key in ("id", "input", "output"):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise Wrong(f"{where}: {key} is missing or no text; mend the item or take it out")
    if UNIT not in item["input"] or UNIT in item["output"]:
        return None
    metadata = item.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise Wrong(f"{where}: metadata is {type(metadata).__name__}, expected an object")
    more = {"task": "tts", "original_task": "asr", "dataset": job.dataset_name}
    return {
        "id": f"tts_{item['id']}",
        "instruction": job.instruction,
        "input": item["output"],
        "output": item["input"],
        "metadata": {**metadata, **more},
    }


def convert(job: Job) -> tuple[dict[Path, list[dict[str, Any]]], Counter[str]]:
    """What a job is to write, by file, and how many items were taken or left out and why."""
    found: dict[Path, list[dict[str, Any]]] = {}
    counts: Counter[str] = Counter()
    files = sorted(path for path in job.input_dir.glob(job.file_pattern) if path.is_file())
    if not files:
        raise Wrong(f"{job.input_dir}: no file is named {job.file_pattern}")
    for path in files:
        if path.stem.endswith(SUFFIX):
            counts["files left out, written by this"] += 1
            continue
        items = []
        for number, item in enumerate(read(path)):
            one = converted(item, job, f"{path}: item {number}")
            counts["converted" if one else "left out, no ASR"] += 1
            if one:
                items.append(one)
        if items:
            found[job.output_dir / f"{path.stem}{SUFFIX}.json"] = items
    return found, counts


def write(path: Path, items: list[dict[str, Any]]) -> None:
    """An item a line; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(draft, path)


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """Those of the flags, or of the config."""
    if arguments.config is None:
        flags = {key: getattr(arguments, key) for key in KEYS}
        return [job({k: v for k, v in flags.items() if v is not None}, "the flags")]
    if given := [key for key in KEYS if getattr(arguments, key) is not None]:
        raise Wrong(f"--{given[0]} beside --config: say it in {arguments.config}")
    try:
        entries = yaml.safe_load(arguments.config.read_text())  # JSON is YAML
    except (OSError, yaml.YAMLError) as error:
        raise Wrong(f"{arguments.config}: cannot be read: {error}") from error
    entries = entries if isinstance(entries, list) else [entries]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise Wrong(f"{arguments.config}: expected an entry or a list of entries")
    return [job(entry, f"{arguments.config}: entry {n}") for n, entry in enumerate(entries)]


def main() -> int:
    """Convert all, then write all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="YAML or JSON: one entry, or a list")
    for key in KEYS:
        parser.add_argument(f"--{key}")
    try:
        done: dict[Path, list[dict[str, Any]]] = {}
        for one in jobs(parser.parse_args()):
            found, counts = convert(one)
            if both := sorted(set(done) & set(found)):
                raise Wrong(f"{both[0]}: two entries would write it; give them other output_dirs")
            done |= found
            said = ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items()))
            print(f"{one.input_dir}: {said}")
    except Wrong as error:
        print(error, file=sys.stderr)
        return 2
    for path, items in done.items():
        write(path, items)
        print(f"{path}: {len(items):,} items")
    return 0


if __name__ == "__main__":
    sys.exit(main())
