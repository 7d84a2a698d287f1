"""What a run writes while it trains: metrics.jsonl, ledger/, quarantine.jsonl, eval.jsonl.

All are lines of JSON, appended and flushed as they happen, and cut back to the checkpoint's step
when a run continues: after any number of restarts every (step, lane) is there exactly once.
events.jsonl, which tells of starts, failures and saves themselves, is never cut back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raysft.data.example import Quarantined
from raysft.run.lines import Lines, cut_back, read_lines, stream_lines

__all__ = [
    "Ledger",
    "Lines",
    "cut_back_run",
    "last_recorded",
    "last_sign_of_life",
    "ledger_files",
    "quarantine_line",
    "read_lines",
    "stream_lines",
]


def cut_back_run(folder: Path, step: int) -> list[str]:
    """Forget everything a run recorded after `step`; one worker does this before others write.

    Returns what was lost with damaged lines, in words. Costs reading what was recorded since the
    start before this one.
    """
    names = ("metrics.jsonl", "eval.jsonl", "quarantine.jsonl")
    lost = [cut_back(folder / name, step) for name in names]
    for files in ledger_files(folder).values():
        while files and files[-1][0] > step + 1:
            files.pop()[1].unlink()
        if files:  # no other can hold later steps: each ends where the next begins
            lost.append(cut_back(files[-1][1], step))
    return [text for text in lost if text is not None]


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
        for line in stream_lines(files[-1][1], {"step": int}):
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
