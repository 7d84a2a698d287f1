"""What a run writes while it trains: metrics.jsonl, ledger/, quarantine.jsonl, eval.jsonl.

All are lines of JSON, appended and flushed as they happen, and cut back to the checkpoint's step
when a run continues: after any number of restarts every (step, lane) is there exactly once.
events.jsonl, which tells of starts, failures and saves themselves, is never cut back.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raysft.data.example import Quarantined
from raysft.json_types import JsonObject
from raysft.patience import patient
from raysft.run.ledger import files as ledger_files
from raysft.run.lines import cut_back, last_step

_AT_ONCE = 16  # files that are cut back


@patient
def cut_back_run(folder: Path, step: int) -> list[str]:
    """Forget everything a run recorded after `step`; one worker does this before others write.

    Returns what was lost with damaged lines, in words. Costs reading, of each lane's ledger, one
    file of `ledger.FULL` bytes at most, and of files that are longer the end.
    """
    names = ("metrics.jsonl", "experts.jsonl", "eval.jsonl", "quarantine.jsonl")
    lost = [cut_back(folder / name, step) for name in names]
    cut_back(folder / "events.jsonl", sys.maxsize)  # keeps every line, in a file of this start's
    last = []
    for files in ledger_files(folder, empty=True).values():
        while files and (files[-1][0] > step + 1 or not files[-1][1].stat().st_size):
            files.pop()[1].unlink()
        if files:  # no other can hold later steps: each ends where the next begins
            last.append(files[-1][1])
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # waiting for the disk, lane by lane
        # In place: one that is so long is of a version that did not begin another in time.
        lost += pool.map(lambda path: cut_back(path, step, in_place=True), last)
    return [text for text in lost if text is not None]


@patient
def last_recorded(folder: Path) -> int:
    """The last step that some lane has in the ledger; 0 without any."""
    return max((last_step(files[-1][1]) for files in ledger_files(folder).values()), default=0)


@patient
def last_sign_of_life(folder: Path) -> float | None:
    """When the run last recorded anything (time.time()); None: it never did. To be asked before
    its files are cut back."""
    files = [files[-1][1] for files in ledger_files(folder).values()]
    files += [folder / name for name in ("metrics.jsonl", "eval.jsonl", "events.jsonl")]
    return max((path.stat().st_mtime for path in files if path.exists()), default=None)


def quarantine_line(found: Quarantined, step: int) -> JsonObject:
    """A line of quarantine.jsonl; step 0 means found before training."""
    return {
        "id": found.id,
        "source": found.source,
        "path": found.path,
        "reason": found.reason,
        **({"kind": found.kind} if found.kind is not None else {}),
        "step": step,
    }
