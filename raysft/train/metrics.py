"""What a run writes while it trains: metrics.jsonl, ledger/, quarantine.jsonl, eval.jsonl.

All are lines of JSON, appended and flushed as they happen, and cut back to the checkpoint's step
when a run continues: after any number of restarts every (step, lane) is there exactly once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from raysft.data.example import Quarantined


class Lines:
    """An append-only file of JSON lines."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 - held open

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; it is with the operating system when this returns."""
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file, without one that a kill cut off; [] if there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def cut_back(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the lines for which `keep` holds; the file is replaced in one move."""
    if not path.exists():
        return
    lines = read_lines(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as out:
        for line in lines:
            if keep(line):
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def cut_back_run(folder: Path, step: int) -> None:
    """Forget everything a run recorded after `step`; one worker does this before others write."""
    for path in (
        folder / "metrics.jsonl",
        folder / "eval.jsonl",
        folder / "quarantine.jsonl",
        *sorted((folder / "ledger").glob("*.jsonl")),
    ):
        cut_back(path, lambda line: line.get("step", 0) <= step)


class Ledger:
    """ledger/lane_L.jsonl: the ids each (step, lane) trained on; a lane has one writer."""

    def __init__(self, folder: Path, lanes: Iterable[int]) -> None:
        self._files = {lane: Lines(folder / "ledger" / f"lane_{lane}.jsonl") for lane in lanes}

    def write(self, epoch: int, step: int, lane: int, ids: list[str]) -> None:
        """Record one micro-batch, after its step is done."""
        self._files[lane].write({"epoch": epoch, "step": step, "lane": lane, "ids": ids})

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
