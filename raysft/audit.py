"""python -m raysft.audit RUN: was every example trained on as planned, none lost, none repeated?

Makes the plan again from plan.json and its indexes and reads the ledger beside it: of every step,
each lane once, with the ids planned for it, in their order; only those that quarantine.jsonl names
may be missing. Every epoch's rows are counted too (without data.mix): as often as the weights say.
The ledger has to reach the newest checkpoint; what lies beyond may end anywhere, so a run that was
interrupted, or still goes on, is judged by what it has recorded so far.

Exit code 0: clean; 1: findings, the first of which are printed, or an error. Reads the ids of all
examples from their data files (20 to 200 us each); of the ledger it holds a few lines a file.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path

from raysft import history, paths
from raysft.cli import guarded, parse
from raysft.config.load import read_tree
from raysft.config.schema import Checkpoint
from raysft.data.generations import open_index
from raysft.data.verify import Line, Report, check
from raysft.errors import UserError
from raysft.run.lines import parse as parse_line
from raysft.train.catalogue import Catalogue

_BLOCK = 1 << 14  # bytes of a ledger file in memory: there may be a thousand files


def audit(run: Path) -> Report:
    """Audit the run in folder `run`. Raises UserError where the folder is not a run's, or where
    what it trained on (an index, a data file) cannot be read any more."""
    generations = history.load(run)
    # First the checkpoint, then the ledger: a run that goes on writes them the other way round.
    committed = _committed(run)
    report = Report(generations.parts[0].plan.settings["lanes"])
    index = open_index(history.places(run))
    quarantined = _Quarantine(run / "quarantine.jsonl", report)
    files = sorted((run / "ledger").glob("*.jsonl"))
    kinds = {"epoch": int, "step": int, "lane": int, "ids": list}
    kept = [_lines(file, kinds, report) for file in files]
    recorded = heapq.merge(*kept, key=lambda line: line["step"])
    check(generations, index.ids, recorded, quarantined, committed, report)
    return report


class _Quarantine:
    """The ids in quarantine.jsonl, where a run that goes on writes them before the ledger's."""

    def __init__(self, path: Path, report: Report) -> None:
        self._path, self._report = path, report
        self._size, self._ids = -1, set[str]()

    def __contains__(self, name: object) -> bool:
        if name not in self._ids and self._path.exists():
            size = self._path.stat().st_size
            if size != self._size:
                self._size = size
                self._ids = {line["id"] for line in _lines(self._path, {"id": str}, self._report)}
        return name in self._ids


def _committed(run: Path) -> int:
    """The step of the newest committed checkpoint; 0 where there is none."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: no run is here (no config.yaml); name a run's folder")
    tree = read_tree(path.read_text(encoding="utf-8"), str(path))
    found = Catalogue.of(Checkpoint.model_validate(tree.get("checkpoint", {})), run).committed()
    return found[-1].step if found else 0


def _lines(path: Path, kinds: dict[str, type], report: Report) -> Iterator[Line]:
    """Lines with these fields, one by one; the file is open only while a block of it is read. A
    last line that is not whole was cut off by a kill, or is being written."""
    if not path.exists():
        return
    offset = number = 0
    rest, block = b"", b"."
    while block:
        with open(path, "rb") as stream:
            stream.seek(offset)
            block = stream.read(_BLOCK)
        offset += len(block)
        *whole, rest = (rest + block).split(b"\n")
        for raw in whole:
            number += 1
            try:
                yield parse_line(raw, kinds)
            except ValueError as error:
                report.add(f"{path.name} line {number}: cannot be read ({error}): {raw[:60]!r}")


def main(argv: Sequence[str]) -> None:
    """Print the first findings and a summary; exit code 1 if there are any."""
    arguments = parse(argv, "usage: python -m raysft.audit RUN", 1, keys=False)
    report = audit(paths.argument(arguments.positional[0], "RUN"))
    for text in report.findings:
        print(text)
    if report.count > len(report.findings):
        print(f"... and {report.count - len(report.findings):,} more")
    print(report.summary())
    if not report.clean:
        raise SystemExit(1)


if __name__ == "__main__":
    guarded(main)
