"""python -m raysft.audit RUN: was every example trained on as planned, none lost, none repeated?

Makes the plan again from plan.json and its indexes and reads the ledger beside it: of every step,
each lane once, with the ids planned for it, in their order. What could not be used is named in the
line of its (step, lane), and in quarantine.jsonl with the reason. Every line has to follow the one
before it (`run.ledger`), and to lead to where each checkpoint that is kept was saved. Every epoch's
rows are counted too (without data.mix): as often as the weights say.
The ledger has to reach the newest checkpoint; what lies beyond may end anywhere, so a run that was
interrupted, or still goes on, is judged by what it has recorded so far.

--deep also reads some batches again from the data (`reread`).

Runs from before lines were chained and named what was quarantined are judged by what they have.
Exit code 0: clean; 1: findings, the first of which are printed, or an error. Reads the ids of all
examples from their data files (20 to 200 us each); of the ledger it holds a few lines a lane.
"""

from __future__ import annotations

import contextlib
import heapq
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from raysft import paths, patience
from raysft.cli import guarded, parse
from raysft.config.checkpoint import Checkpoint
from raysft.config.load import read_tree
from raysft.data.plan.generations import open_index
from raysft.data.plan.verify import Line, Report, check
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.reread import Sample, reread
from raysft.run import plans, stages
from raysft.run.catalogue import Catalogue
from raysft.run.folder import load_plugins
from raysft.run.ledger import Chains, Heads, files
from raysft.run.lines import parse as parse_line

USAGE = """usage: {command} RUN [--deep [--sample N]]

--deep reads N batches (32) again from the data and compares them with what was trained on."""
SAMPLE = 32
_BLOCK = 1 << 14  # bytes of a ledger file in memory: there may be a thousand lanes


def audit(run: Path, sample: int = 0) -> Report:
    """Audit the run in folder `run`; sample: batches to be read again. Raises UserError where the
    folder is not a run's, or where what it trained on (an index, a data file) cannot be read any
    more."""
    generations = plans.load(run)
    report = Report(generations.parts[0].plan.settings["lanes"])
    # First the checkpoints, then the ledger: a run that goes on writes them the other way round.
    committed, heads = _saved(run, report)
    load_plugins(run)  # ids are read by their formats
    chains = Chains(plans.identity(run), heads, plans.chained(run))
    index = open_index(plans.places(run))
    quarantined = _Quarantine(run / "quarantine.jsonl", report)
    some = Sample(sample)
    check(
        generations,
        index.ids,
        _recorded(run, report),
        quarantined,
        committed,
        report,
        follow=chains.follow,
        seen=some.add if sample else lambda *_: None,
    )
    if sample:
        if some.without:
            report.notes.append(
                f"{some.without:,} lines of the ledger are from before there were digests"
            )
        reread(run, some, report)
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


def _saved(run: Path, report: Report) -> tuple[int, dict[int, Heads]]:
    """The step of the newest committed checkpoint (0: there is none); and, by step, where the
    ledger's chains stood at those that say so."""
    settings = _section(run, "checkpoint")
    catalogue = Catalogue.of(Checkpoint.model_validate(settings), run)
    found = catalogue.committed()
    heads: dict[int, Heads] = {}
    for saved in found:
        try:
            chain = saved.meta().get("chain")
        except UserError as error:
            if saved.step in {left.step for left in catalogue.committed()}:  # not pruned meanwhile
                report.add(f"what the ledger was at step {saved.step} is not known: {error}")
            continue
        if chain is not None:
            heads[saved.step] = {int(lane): head for lane, head in chain.items()}
    return (found[-1].step if found else 0), heads


def _section(run: Path, name: str) -> JsonObject:
    """Of the run's config, alone: of older versions the rest may not be valid any more."""
    path = run / "config.yaml"
    if not path.is_file():
        stages.refuse_folder(run)
        raise UserError(f"{run}: no run is here (no config.yaml); name a run's folder")
    return read_tree(path.read_text(encoding="utf-8"), str(path)).get(name, {})


_FIELDS = {"epoch": int, "step": int, "lane": int, "ids": list}


def _recorded(run: Path, report: Report) -> Iterator[Line]:
    """All lines of the ledger, by step. Notes those that lie in a file they do not belong into:
    each file holds one lane, from its first step to that of the lane's next file."""
    known = files(run)
    parts: list[Iterator[Line]] = []
    for lane, own in known.items():
        ends = [first for first, _ in own[1:]] + [sys.maxsize]
        parts.append(_of_lane(lane, [(p, range(n, end)) for (n, p), end in zip(own, ends)], report))
    ours = {path for own in files(run, empty=True).values() for _, path in own}
    for path in sorted((run / "ledger").glob("*.jsonl")):
        if path not in ours:
            report.add(f"{path.name}: is no file of the ledger")
            parts.append(_lines(path, _FIELDS, report))
    return heapq.merge(*parts, key=lambda line: line["step"])


def _of_lane(lane: int, own: list[tuple[Path, range]], report: Report) -> Iterator[Line]:
    for path, steps in own:
        yield from _of_file(path, lane, steps, report)


def _of_file(path: Path, lane: int, steps: range, report: Report) -> Iterator[Line]:
    for line in _lines(path, _FIELDS, report):
        if line["lane"] == lane and line["step"] in steps:
            yield line
        else:
            report.add(
                f"step {line['step']}, lane {line['lane']}: lies in {path.name}, where it does not "
                "belong"
            )


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
                line = _parsed(raw, kinds)
            except ValueError as error:
                report.add(f"{path.name} line {number}: cannot be read ({error}): {raw[:60]!r}")
                continue
            yield line
    with contextlib.suppress(ValueError):
        yield _parsed(rest, kinds)


def _parsed(raw: bytes, kinds: dict[str, type]) -> Line:
    line = parse_line(raw, kinds)
    _check_texts(line)
    return line


def _check_texts(line: Line) -> None:
    """Raises ValueError where ids, or digests, are no texts."""
    for name in ("ids", "quarantined"):
        names = line.get(name, [])
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise ValueError(f"{name} are no texts")
    if not all(isinstance(line.get(name, ""), str) for name in ("chain", "tensors")):
        raise ValueError("its digests are no texts")


def main(argv: Sequence[str], command: str = "python -m raysft.audit") -> None:
    """Print the first findings and a summary; exit code 1 if there are any. command: what was
    typed, for the usage."""
    arguments = parse(argv, USAGE.format(command=command), 1, ["deep", "sample="], keys=False)
    deep, given = "deep" in arguments.flags, arguments.flags.get("sample", str(SAMPLE))
    if not str(given).isdecimal() or not int(given):
        raise UserError(f"--sample {given}: expected a number of batches, at least 1")
    if "sample" in arguments.flags and not deep:
        raise UserError("--sample: goes with --deep")
    run = paths.argument(arguments.positional[0], "RUN")
    patience.allow(_section(run, "data").get("retry_s", patience.SECONDS))
    report = audit(run, int(given) if deep else 0)
    for text in report.notes:
        print(f"note: {text}")
    for text in report.findings:
        print(text)
    if report.count > len(report.findings):
        print(f"... and {report.count - len(report.findings):,} more")
    print(report.summary())
    if not report.clean:
        raise SystemExit(1)


if __name__ == "__main__":
    guarded(main)
