"""The ledger: what every (step, lane) trained on, each line chained to the one before it.

    ledger/lane_L_from_N.jsonl   lane L from step N on, up to its next file: a file for each start
                                 of the run, and another one every FULL bytes

    {"epoch", "step", "lane",
     "ids": [...],           the examples trained on, in the order planned
     "quarantined": [...],   those planned here that could not be used: ids and these are the plan's
     "tensors": "...",       digest of what the model was given (see `data.digest`)
     "rollouts": "...",      where answers were sampled: digest of their tokens
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
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

from raysft.patience import patient
from raysft.run.lines import Line, Lines

Heads = dict[int, str]
"""Of each lane the chain of its last line."""
FULL = 4 << 20
"""Bytes after which a lane goes on in another file."""


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
    run its own files.

    Files are short, so that whoever goes on from a checkpoint has little to look through, and can
    put a copy in the place of the last one.
    """

    def __init__(
        self,
        folder: Path,
        lanes: Iterable[int],
        first: int,
        heads: Mapping[int, str],
        owned: Callable[[], None] = lambda: None,
    ) -> None:
        """first: the step of the first line. heads: where the chains of these lanes stand. owned:
        called between the making of a later file and its first line: raises UserError where the run
        is another's by now. Whoever took it over before the file was there does not know of it,
        whoever comes later clears it away."""
        self._folder, self._owned = folder / "ledger", owned
        self._files = {lane: self._open(lane, first) for lane in lanes}
        self._full: list[Lines] = []  # to be synced, and closed
        self.heads: Heads = {lane: heads[lane] for lane in self._files}

    def _open(self, lane: int, first: int, new: bool = False) -> Lines:
        return Lines(self._folder / f"lane_{lane}_from_{first}.jsonl", new)

    def write(
        self,
        epoch: int,
        step: int,
        lane: int,
        ids: list[str],
        quarantined: Iterable[str] = (),
        tensors: str = "",
        told: Line | None = None,
    ) -> None:
        """Record one micro-batch, after its step is done. told: what else its line is to say."""
        line: Line = {"epoch": epoch, "step": step, "lane": lane, "ids": ids}
        line |= {"quarantined": list(quarantined), "tensors": tensors, **(told or {})}
        line["chain"] = chain(self.heads[lane], line)
        if self._files[lane].size >= FULL:
            following = self._open(lane, step, new=True)
            self._owned()
            self._full.append(self._files[lane])
            self._files[lane] = following
        self._files[lane].write(line)
        self.heads[lane] = line["chain"]

    def sync(self) -> None:
        """What was written is on the disk when this returns. Another thread may write meanwhile."""
        for file in list(self._files.values()):
            file.sync()
        while self._full:  # after the others: what was moved here meanwhile is synced here
            self._full[0].sync()
            self._full.pop(0).close()

    def close(self) -> None:
        """Close the files."""
        for file in [*self._files.values(), *self._full]:
            file.close()


_NAME = re.compile(r"lane_(\d+)_from_(\d+)\.jsonl")


@patient
def files(folder: Path, empty: bool = False) -> dict[int, list[tuple[int, Path]]]:
    """Of each lane: (first step it may hold, file), in the order of steps.

    empty: also those without a line, which a start leaves that has written nothing.
    """
    found: dict[int, list[tuple[int, Path]]] = {}
    try:
        # Path.glob takes a folder that it may not read for an empty one.
        entries = list(os.scandir(folder / "ledger"))
    except FileNotFoundError:
        entries = []
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if match and (empty or entry.stat().st_size):
            path = folder / "ledger" / entry.name
            found.setdefault(int(match[1]), []).append((int(match[2]), path))
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
