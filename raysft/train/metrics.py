"""What a run writes while it trains: metrics.jsonl, ledger/, quarantine.jsonl, eval.jsonl.

All are lines of JSON, appended and flushed as they happen, and cut back to the checkpoint's step
when a run continues: after any number of restarts every (step, lane) is there exactly once.
events.jsonl, which tells of starts, failures and saves themselves, is never cut back.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from raysft.data.example import Quarantined


class Lines:
    """An append-only file of JSON lines."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_half_a_line(path)
        self.path = path
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 - held open

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; it is with the operating system when this returns."""
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """What was written is on the disk when this returns."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _drop_half_a_line(path: Path) -> None:
    """A kill or a full disk cut it off; what is appended must not become its end."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if size and file.read() != b"\n":
            file.truncate(path.read_bytes().rfind(b"\n") + 1)


def stream_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file, one after the other, without one that a kill cut off."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All of `stream_lines`; [] if there is no file."""
    return list(stream_lines(path))


def cut_back(path: Path, step: int) -> None:
    """Keep the lines up to `step`. The file is always replaced by another of its name: a worker
    of an earlier start that should still be alive goes on writing into the one that is gone."""
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as out:
        for line in stream_lines(path):
            if line.get("step", 0) <= step:
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def cut_back_run(folder: Path, step: int) -> None:
    """Forget everything a run recorded after `step`; one worker does this before others write.

    Costs reading what was recorded since the start before this one.
    """
    for name in ("metrics.jsonl", "eval.jsonl", "quarantine.jsonl"):
        cut_back(folder / name, step)
    for files in ledger_files(folder).values():
        while files and files[-1][0] > step + 1:
            files.pop()[1].unlink()
        if files:  # no other can hold later steps: each ends where the next begins
            cut_back(files[-1][1], step)


_LEDGER = re.compile(r"lane_(\d+)_from_(\d+)\.jsonl")


def ledger_files(folder: Path) -> dict[int, list[tuple[int, Path]]]:
    """Of each lane: (first step it may hold, file), in the order of steps."""
    found: dict[int, list[tuple[int, Path]]] = {}
    for path in (folder / "ledger").glob("*.jsonl"):
        match = _LEDGER.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), []).append((int(match[2]), path))
    return {lane: sorted(files) for lane, files in sorted(found.items())}


def last_recorded(folder: Path) -> int:
    """The last step that some lane has in the ledger; 0 without any."""
    last = 0
    for files in ledger_files(folder).values():
        for line in stream_lines(files[-1][1]):
            last = max(last, line["step"])
    return last


def last_sign_of_life(folder: Path) -> float | None:
    """When the run last recorded anything (time.time()); None: it never did. To be asked before
    its files are cut back."""
    files = [files[-1][1] for files in ledger_files(folder).values()]
    files += [folder / name for name in ("metrics.jsonl", "eval.jsonl", "events.jsonl")]
    return max((path.stat().st_mtime for path in files if path.exists()), default=None)


class Ledger:
    """ledger/lane_L_from_N.jsonl: the ids each (step, lane) trained on, from step N on.

    A lane has one writer, and every start of a run its own files.
    """

    def __init__(self, folder: Path, lanes: Iterable[int], first: int) -> None:
        self._files = {
            lane: Lines(folder / "ledger" / f"lane_{lane}_from_{first}.jsonl") for lane in lanes
        }

    def write(self, epoch: int, step: int, lane: int, ids: list[str]) -> None:
        """Record one micro-batch, after its step is done."""
        self._files[lane].write({"epoch": epoch, "step": step, "lane": lane, "ids": ids})

    def sync(self) -> None:
        """What was written is on the disk when this returns."""
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def quarantine_line(found: Quarantined, step: int) -> dict[str, Any]:
    """A line of quarantine.jsonl; step 0 means found before training."""
    return {
        "id": found.id,
        "source": found.source,
        "path": found.path,
        "reason": found.reason,
        "step": step,
    }
