"""Whatever is changed in a ledger, the audit finds it: one change at a time, of every kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysft.audit import audit
from tests.support.indexes import most
from tests.unit.test_audit import Run

Files = dict[str, list[bytes]]
COMMITTED, STEPS = 12, 16  # beyond the checkpoint a run may have been interrupted


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Files, Files]:
    """A run of three starts; the files of its ledger, and those of another run of the same plan."""
    found = []
    for name in ("mine", "other"):
        home = tmp_path_factory.mktemp(name)
        run = Run(home)
        (run.folder / "config.yaml").write_text(f"id: {name}\n")  # the rest is as it is by default
        corpus = most(home / "a.json", 40)
        for steps, save in ((5, True), (7, True), (4, False)):
            run.train(steps, corpus, save=save)
        assert audit(run.folder).clean
        found.append((run, read(run.folder)))
    (run, files), (_, others) = found
    assert [sorted(files), len(files)] == [sorted(others), 9]
    return run, files, others


def read(run: Path) -> Files:
    return {
        path.name: path.read_bytes().splitlines(keepends=True)
        for path in sorted((run / "ledger").iterdir())
    }


def parsed(files: Files) -> dict[str, list[Any]]:
    """What the files say: white space and the order of keys are no part of it."""

    def line(raw: bytes) -> Any:
        try:
            return json.loads(raw)
        except ValueError:
            return raw

    return {name: [line(raw) for raw in lines] for name, lines in files.items() if lines}


def interrupted(before: Files, now: Files) -> bool:
    """Whether only lines beyond the checkpoint are missing at the end of lanes, as after a kill."""
    ended = {name: [raw for raw in lines if raw.endswith(b"\n")] for name, lines in now.items()}
    was, is_ = parsed(before), parsed(ended)
    for name, lines in was.items():
        left = is_.pop(name, [])
        if lines[: len(left)] != left:
            return False
        if any(line["step"] <= COMMITTED for line in lines[len(left) :]):
            return False
    return not is_


class Change:
    """Draws one change of a ledger's files."""

    def __init__(self, rng: np.random.Generator, files: Files, others: Files) -> None:
        self.rng, self.files, self.others = rng, files, others

    def pick(self) -> tuple[str, int]:
        name = str(self.rng.choice(sorted(self.files)))
        return name, int(self.rng.integers(len(self.files[name])))

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        name, at = self.pick()
        line = json.loads(self.files[name][at])
        change(line)
        self.files[name][at] = (json.dumps(line) + "\n").encode()

    def delete(self) -> None:
        name, at = self.pick()
        del self.files[name][at]

    def swap(self) -> None:
        (a, i), (b, j) = self.pick(), self.pick()
        self.files[a][i], self.files[b][j] = self.files[b][j], self.files[a][i]

    def neighbours(self) -> None:
        name, at = self.pick()
        lines = self.files[name]
        at = min(at, len(lines) - 2)
        lines[at : at + 2] = lines[at : at + 2][::-1]

    def exchange_ids(self) -> None:
        (a, i), (b, j) = self.pick(), self.pick()
        one, two = json.loads(self.files[a][i]), json.loads(self.files[b][j])
        one["ids"], two["ids"] = two["ids"], one["ids"]
        self.files[a][i] = (json.dumps(one) + "\n").encode()
        self.files[b][j] = (json.dumps(two) + "\n").encode()

    def duplicate(self) -> None:
        (a, i), (b, j) = self.pick(), self.pick()
        self.files[b].insert(j + int(self.rng.integers(2)), self.files[a][i])

    def move(self) -> None:
        (a, i), (b, j) = self.pick(), self.pick()
        line = self.files[a].pop(i)
        self.files[b].insert(min(j, len(self.files[b])), line)

    def number(self) -> None:
        key = str(self.rng.choice(["epoch", "step", "lane"]))
        by = int(self.rng.choice([-20, -1, 1, 2, 30]))
        self.edit(lambda line: line.update({key: line[key] + by}))

    def names(self) -> None:
        def change(line: dict[str, Any]) -> None:
            key = str(self.rng.choice(["ids", "quarantined"]))
            names, at = line[key], int(self.rng.integers(len(line[key]) + 1))
            kind = self.rng.integers(5)
            if kind == 0:
                names.insert(at, "m" + str(self.rng.integers(50)))
            elif kind == 1:
                del names[at:]
            elif kind == 2:
                names[at : at + 1] = ["m" + str(self.rng.integers(50))]
            elif kind == 3:
                names.reverse()
            else:
                other = {"ids": "quarantined", "quarantined": "ids"}[key]
                line[other] += names[at : at + 1]
                del names[at : at + 1]

        self.edit(change)

    def digests(self) -> None:
        key = str(self.rng.choice(["tensors", "chain"]))
        self.edit(lambda line: line.update({key: f"{self.rng.integers(2**63):032x}"}))

    def fields(self) -> None:
        def change(line: dict[str, Any]) -> None:
            key = str(self.rng.choice(sorted(line)))
            if self.rng.integers(2):
                del line[key]
            else:
                line[key] = [None, "x", [1], {}][self.rng.integers(4)]

        self.edit(change)

    def added(self) -> None:
        self.edit(lambda line: line.update({"note": 1}))

    def foreign(self) -> None:
        name, at = self.pick()
        self.files[name][at] = self.others[name][at]

    def foreign_file(self) -> None:
        name, _ = self.pick()
        self.files[name] = list(self.others[name])

    def foreign_all(self) -> None:
        self.files.update({name: list(lines) for name, lines in self.others.items()})

    def cut(self) -> None:
        name, at = self.pick()
        del self.files[name][at:]

    def cut_lane(self) -> None:
        lane, step = int(self.rng.integers(3)), int(self.rng.integers(1, STEPS + 1))
        self._cut(f"lane_{lane}_", step)

    def cut_all(self) -> None:
        self._cut("lane_", int(self.rng.integers(1, STEPS + 1)))

    def _cut(self, lane: str, step: int) -> None:
        for name, lines in self.files.items():
            if name.startswith(lane):
                self.files[name] = [raw for raw in lines if json.loads(raw)["step"] < step]

    def lost_file(self) -> None:
        del self.files[self.pick()[0]]

    def renamed_file(self) -> None:
        name, _ = self.pick()
        lane, first = self.rng.integers(4), self.rng.integers(1, 20)
        self.files[f"lane_{lane}_from_{first}.jsonl"] = self.files.pop(name)

    def stray_file(self) -> None:
        name, at = self.pick()
        self.files["more.jsonl"] = [self.files[name][at]]

    def bits(self) -> None:
        name, at = self.pick()
        raw = bytearray(self.files[name][at])
        raw[self.rng.integers(len(raw))] ^= 1 << int(self.rng.integers(8))
        self.files[name][at] = bytes(raw)

    def torn(self) -> None:
        name, at = self.pick()
        raw = self.files[name][at]
        self.files[name][at] = raw[: self.rng.integers(len(raw))]

    def zeros(self) -> None:
        name, at = self.pick()
        self.files[name].insert(at, b"\0" * int(self.rng.integers(1, 99)) + b"\n")


KINDS = sorted(
    name
    for name, value in vars(Change).items()
    if callable(value) and not name.startswith("_") and name not in ("pick", "edit")
)


def found(run: Run, files: Files, others: Files, kind: str, seed: int) -> bool:
    """Make a change; whether it was one. Fails where the audit does not find it."""
    changed = {name: list(lines) for name, lines in files.items()}
    getattr(Change(np.random.default_rng([seed, KINDS.index(kind)]), changed, others), kind)()
    contents = {name: b"".join(lines) for name, lines in changed.items()}
    changed = {name: raw.splitlines(keepends=True) for name, raw in contents.items()}
    changed = {name: lines for name, lines in changed.items() if lines}
    if parsed(changed) == parsed(files):
        return False
    folder = run.folder / "ledger"
    shutil.rmtree(folder)
    folder.mkdir()
    for name, raw in contents.items():
        (folder / name).write_bytes(raw)
    report = audit(run.folder)
    assert report.clean == interrupted(files, changed), (kind, seed, report.findings)
    return not report.clean


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "cases", [5, pytest.param(450, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_any_single_change_of_a_ledger_is_found(
    kind: str, cases: int, runs: tuple[Run, Files, Files]
) -> None:
    assert sum(found(*runs, kind, seed) for seed in range(cases)) > cases // 3
