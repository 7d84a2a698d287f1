"""The ledger: what every (step, lane) trained on, each line chained to the one before it.

    ledger/lane_L_from_N.jsonl   lane L from step N on: a file for each start of the run

    {"epoch", "step", "lane",
     "ids": [...],           the examples trained on, in the order planned
     "quarantined": [...],   those planned here that could not be used: ids and these are the plan's
     "tensors": "...",       digest of what the model was given (see `data.digest`)
     "chain": "..."}         digest of the chain of this lane's line before, and of this line

Before a lane's first line its chain is made of the run's identity. Where the lanes' chains stand
goes into every checkpoint and is taken from there by whoever goes on: whatever the number of
workers, a line that was changed, left out, moved, repeated or taken from another run no longer
follows the one before it, or leads elsewhere than to where the checkpoint was. Costs 15 us a line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

from raysft.patience import patient
from raysft.run.lines import Line, Lines

Heads = dict[int, str]
"""Of each lane the chain of its last line."""


def genesis(identity: str, lane: int) -> str:
    """The chain of a lane before its first line."""
    return blake2b(json.dumps([identity, lane]).encode(), digest_size=16).hexdigest()


def chain(before: str, line: Line) -> str:
    """The chain of a line that follows the one whose chain is `before`."""
    content = {key: value for key, value in line.items() if key != "chain"}
    text = f"{before}\n{json.dumps(content, sort_keys=True)}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


class Ledger:
    """Writes the lines of some lanes, from a step on. A lane has one writer, and every start of a
    run its own files."""

    def __init__(
        self, folder: Path, lanes: Iterable[int], first: int, heads: Mapping[int, str]
    ) -> None:
        """first: the step of the first line. heads: where the chains of these lanes stand."""
        self._files = {
            lane: Lines(folder / "ledger" / f"lane_{lane}_from_{first}.jsonl") for lane in lanes
        }
        self.heads: Heads = {lane: heads[lane] for lane in self._files}

    def write(
        self,
        epoch: int,
        step: int,
        lane: int,
        ids: list[str],
        quarantined: Iterable[str] = (),
        tensors: str = "",
    ) -> None:
        """Record one micro-batch, after its step is done."""
        line: Line = {"epoch": epoch, "step": step, "lane": lane, "ids": ids}
        line |= {"quarantined": list(quarantined), "tensors": tensors}
        line["chain"] = chain(self.heads[lane], line)
        self._files[lane].write(line)
        self.heads[lane] = line["chain"]

    def sync(self) -> None:
        """What was written is on the disk when this returns."""
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


_NAME = re.compile(r"lane_(\d+)_from_(\d+)\.jsonl")


@patient
def files(folder: Path) -> dict[int, list[tuple[int, Path]]]:
    """Of each lane: (first step it may hold, file), in the order of steps."""
    found: dict[int, list[tuple[int, Path]]] = {}
    try:
        names = os.listdir(folder / "ledger")  # Path.glob takes a folder it may not read for empty
    except FileNotFoundError:
        names = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match:
            found.setdefault(int(match[1]), []).append((int(match[2]), folder / "ledger" / name))
    return {lane: sorted(files) for lane, files in sorted(found.items())}


class Chains:
    """Follows the chains of all lanes through the lines of a ledger, in the order of their steps.

    Lines from before there were chains come first, if at all, and follow nothing.
    """

    def __init__(self, identity: str, saved: Mapping[int, Heads], whole: bool) -> None:
        """saved: by step, where the chains stood at checkpoints. whole: every line has a chain, for
        the run began with them."""
        self._identity, self._saved, self._whole = identity, saved, whole
        self._heads: Heads = {}
        self._steps: dict[int, int] = {}

    def follow(self, line: Line) -> str | None:
        """What is wrong with the chain of the next line of its lane, in words, or None."""
        lane, step, given = line["lane"], line["step"], line.get("chain")
        before, last = self._heads.get(lane), self._steps.get(lane, 0)
        if step <= last:  # recorded again, or out of order: said by whoever counts steps
            return None
        self._steps[lane] = step
        if given is None:
            if before is None and not self._whole:
                return self._at_checkpoint(line)
            return "has no chain, as the ledger's other lines have"
        self._heads[lane] = given
        if step > last + 1:  # so is that lines are missing
            return self._at_checkpoint(line)
        if given != chain(before or genesis(self._identity, lane), line):
            return "is not the line that was written after the one before it (chain differs)"
        return self._at_checkpoint(line)

    def _at_checkpoint(self, line: Line) -> str | None:
        heads = self._saved.get(line["step"])
        if heads is None or heads.get(line["lane"]) == line.get("chain"):
            return None
        return f"is not where checkpoint step_{line['step']} left the ledger (chain differs)"
