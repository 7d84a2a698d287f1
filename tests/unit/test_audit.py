"""The audit: clean for what a run writes, and every kind of fault named by step, lane and ids.

The runs are real folders with real indexes; only the training in between is left out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysft.audit import audit, main
from raysft.config import Config, to_yaml
from raysft.config.schema import Data
from raysft.data.plan.generations import Generation, Generations, open_index
from raysft.data.plan.kinds import Languages
from raysft.data.plan.plan import Cursor, Plan, PlannedStep
from raysft.data.plan.shares import Wanted
from raysft.data.plan.verify import Report, check
from raysft.errors import UserError
from raysft.run import plans
from raysft.run.ledger import Ledger, genesis
from raysft.run.lines import read_lines
from raysft.train.metrics import cut_back_run
from tests.support.indexes import build, most

LANES = 3
QUARANTINED = ("m7", "m20")


@pytest.mark.parametrize(
    ("asked", "data"),
    [
        ({}, {"temperature": {"T": 3.0}}),
        ({}, {"temperature": {"T": 3.0, "by": "task"}}),
        ({}, {"temperature": {"T": 3.0, "by": "lang"}}),
        ({"max_examples": [30, None]}, {}),
        ({"max_examples": [30, None]}, {"order": "sequential"}),
    ],
)
def test_what_is_seen_more_or_less_often_by_the_config_is_no_finding(
    asked: dict[str, Any], data: dict[str, Any]
) -> None:
    n = 200
    columns = (np.full(n, 20, np.int32), (np.arange(n) % 5 == 0).astype(np.int16), ("asr", "tts"))
    settings = Data(**{"lanes": LANES, "tokens_per_batch": 60, "window": 16, **data})
    source, lang = (np.arange(n) >= 150).astype(np.int16), (np.arange(n) % 7 < 2).astype(np.int32)
    more: dict[str, Any] = {
        "wanted": Wanted([1.0, 2.5], ("a", "b"), **asked),
        "languages": Languages(("", "de"), lang),
    }
    of = Plan(*columns, source, [1.0, 2.5], "index", settings, 0, **more)
    every = Generations([Generation(0, n, lambda: of)])
    count = of.summary(0).steps + of.summary(1).steps

    def recorded() -> list[dict[str, Any]]:
        steps = itertools.islice(of.steps(of.start()), count + 1)
        return [
            {"epoch": step.epoch, "step": step.step, "lane": lane, "ids": list(map(str, rows))}
            for step in steps
            for lane, rows in enumerate(step.lanes)
        ]

    report = Report(LANES)
    check(every, lambda rows: list(map(str, rows.tolist())), recorded(), (), count, report)
    assert report.clean and report.epochs == 3, report.findings
    # A plan that has another weight than it says.
    of.dealt = replace(of.dealt, passes=of.dealt.passes + 2.0)
    report = Report(LANES)
    check(every, lambda rows: list(map(str, rows.tolist())), recorded(), (), count, report)
    assert "left out of the plan" in report.findings[0]


class Run:
    """A run's folder, written as training writes it."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.folder = folder / "runs" / "a"
        self.folder.mkdir(parents=True)
        (self.folder / "config.yaml").write_text(to_yaml(Config()))
        self.cursor: Cursor | None = None
        self.heads: dict[int, str] = {}

    def train(self, steps: int, *corpora: Path, save: bool = True) -> None:
        """Some steps in one more start of the run."""
        index = build(self.home / "index", *corpora)
        data = Data(lanes=LANES, tokens_per_batch=40, window=8, extend=True)
        generations = plans.follow(self.folder, index, data, 0, self.cursor)
        rows = open_index(plans.places(self.folder))
        cursor = self.cursor or generations.start()
        cut_back_run(self.folder, cursor.step)
        known = {line["id"] for line in read_lines(self.folder / "quarantine.jsonl")}
        begun = {lane: genesis(plans.identity(self.folder), lane) for lane in range(LANES)}
        ledger = Ledger(self.folder, range(LANES), cursor.step + 1, self.heads or begun)
        for step in itertools.islice(generations.steps(cursor), steps):
            for lane, planned in enumerate(step.lanes):
                ids = rows.ids(planned)
                for name in ids:
                    if name in QUARANTINED and name not in known:
                        known.add(name)
                        self.append("quarantine.jsonl", {"id": name, "step": step.step})
                trained = [name for name in ids if name not in QUARANTINED]
                refused = [name for name in ids if name in QUARANTINED]
                ledger.write(step.epoch, step.step, lane, trained, refused)
            cursor = step.after
        ledger.close()
        if save:
            self.cursor, self.heads = cursor, dict(ledger.heads)
            self.commit(cursor.step)

    def append(self, name: str, line: dict[str, Any]) -> None:
        with open(self.folder / name, "a") as out:
            out.write(json.dumps(line) + "\n")

    def commit(self, step: int) -> None:
        """As far as anyone who does not look at the state is concerned."""
        folder = self.folder / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        meta = json.dumps({"step": step, "chain": self.heads}).encode()
        (folder / "meta.json").write_bytes(meta)
        (folder / "COMMITTED").write_text(hashlib.sha256(meta).hexdigest())

    def edit(self, name: str, change: Callable[[list[dict]], list[dict]]) -> None:
        path = self.folder / name
        lines = change(read_lines(path))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return most(tmp_path / "a.json", 50)


def lane(number: int, first: int = 1) -> str:
    """A ledger file of the start that began with step `first`."""
    return f"ledger/lane_{number}_from_{first}.jsonl"


def findings(run: Run) -> list[str]:
    report = audit(run.folder)
    assert not report.clean
    return report.findings


def test_a_whole_run_is_clean(run: Run, corpus: Path) -> None:
    run.train(20, corpus)
    report = audit(run.folder)
    assert report.clean
    total = sum(
        len(line["ids"]) for file in (run.folder / "ledger").iterdir() for line in read_lines(file)
    )
    epochs = report.epochs
    assert epochs > 1
    assert report.summary() == (
        f"audit: clean: 20 steps x 3 lanes, {epochs} epochs, {total} examples, 2 quarantined, "
        "0 lost, 0 repeated"
    )


def test_restarts_and_a_ledger_file_for_each_of_them_are_clean(run: Run, corpus: Path) -> None:
    run.train(5, corpus)
    run.train(4, corpus, save=False)  # killed before its checkpoint
    run.train(7, corpus)
    report = audit(run.folder)
    assert report.clean, report.findings
    assert report.steps == 12


def test_a_run_whose_data_grew_is_clean(run: Run, corpus: Path, tmp_path: Path) -> None:
    run.train(3, corpus)
    run.train(15, corpus, most(tmp_path / "b.json", 20, start=50))
    report = audit(run.folder)
    assert report.clean, report.findings
    assert report.steps == 18
    ids = {
        name
        for file in (run.folder / "ledger").iterdir()
        for line in read_lines(file)
        for name in line["ids"]
    }
    assert "m69" in ids


def test_an_interrupted_or_running_run_is_judged_by_what_it_has_recorded(
    run: Run, corpus: Path
) -> None:
    run.train(5, corpus)
    run.train(4, corpus, save=False)
    with open(run.folder / lane(0), "a") as out:
        out.write('{"epoch": 1, "step": 10, "la')  # being written, or cut off
    run.edit(lane(2, 6), lambda lines: lines[:-2])  # a worker that is behind
    report = audit(run.folder)
    assert report.clean, report.findings
    assert report.steps == 7


def test_a_run_without_a_step_is_clean(run: Run, corpus: Path) -> None:
    run.train(0, corpus, save=False)
    assert audit(run.folder).summary().startswith("audit: clean: 0 steps x 3 lanes")


def test_a_ledger_that_ends_before_the_checkpoint_is_found(run: Run, corpus: Path) -> None:
    run.train(8, corpus)
    lost = read_lines(run.folder / lane(1))[-1]
    run.edit(lane(1), lambda lines: lines[:-1])
    (said,) = findings(run)
    assert said.startswith(f"step 8, lane 1: is not in the ledger: {lost['ids'][0]}")
    for number in range(LANES):
        (run.folder / lane(number)).unlink()
    assert audit(run.folder).count == 8 * LANES


def test_a_line_left_out_in_the_middle_is_found_beyond_the_checkpoint_too(
    run: Run, corpus: Path
) -> None:
    run.train(2, corpus)
    run.train(8, corpus, save=False)
    lines = read_lines(run.folder / lane(1, 3))
    at = next(at for at, line in enumerate(lines) if line["ids"])
    run.edit(lane(1, 3), lambda lines: [*lines[:at], *lines[at + 1 :]])
    (said,) = findings(run)
    step = lines[at]["step"]
    assert said == f"step {step}, lane 1: is not in the ledger, step {step + 1} is"
    assert audit(run.folder).lost == len(lines[at]["ids"])


def test_a_line_that_is_there_twice_is_found(run: Run, corpus: Path) -> None:
    run.train(8, corpus)
    run.edit(lane(1), lambda lines: [*lines, lines[3]])
    (said,) = findings(run)
    assert said.startswith("step 4, lane 1: recorded again or out of order: m")
    assert audit(run.folder).repeated > 0


def test_lost_repeated_and_foreign_ids_are_found_and_named(run: Run, corpus: Path) -> None:
    run.train(8, corpus)
    before = read_lines(run.folder / lane(0))

    def change(lines: list[dict]) -> list[dict]:
        lines[1]["ids"] = lines[1]["ids"][1:]
        lines[2]["ids"] = [*lines[2]["ids"], "m999"]
        lines[3]["ids"] = [*lines[3]["ids"], lines[3]["ids"][0]]
        lines[4]["ids"] = lines[4]["ids"][::-1]
        lines[5]["epoch"] += 1
        return lines

    run.edit(lane(0), change)
    said = findings(run)
    lost, repeated = before[1]["ids"][0], before[3]["ids"][0]
    assert said[0] == f"step 2, lane 0: planned, not trained on, not quarantined: {lost}"
    assert said[2] == "step 3, lane 0: trained on, not planned here: m999"
    assert said[4] == f"step 4, lane 0: trained on, not planned here: {repeated}"
    assert said[6].startswith("step 5, lane 0: in another order than planned: ")
    assert said[8].startswith("step 6, lane 0: recorded in epoch ")
    unlike = "is not the line that was written after the one before it (chain differs)"
    assert said[1::2] == [f"step {step}, lane 0: {unlike}" for step in range(2, 7)]
    report = audit(run.folder)
    assert (report.count, report.lost, report.repeated) == (10, 1, 2)
    assert report.quarantined == set(QUARANTINED)


def test_a_quarantined_example_has_to_be_named_in_its_line_and_in_quarantine_jsonl(
    run: Run, corpus: Path
) -> None:
    run.train(8, corpus)
    assert audit(run.folder).quarantined == set(QUARANTINED)
    kept = (run.folder / "quarantine.jsonl").read_bytes()
    run.edit("quarantine.jsonl", lambda lines: [line for line in lines if line["id"] != "m7"])
    said = findings(run)
    assert said
    assert all(
        text.endswith("quarantined, and quarantine.jsonl does not say why: m7") for text in said
    )
    (run.folder / "quarantine.jsonl").write_bytes(kept)
    # What quarantine.jsonl names is no excuse where the line itself says nothing.
    run.edit(lane(0), lambda lines: [{**line, "quarantined": []} for line in lines])
    assert any("planned, not trained on, not quarantined: m" in text for text in findings(run))


def test_a_ledger_from_before_lines_were_chained_is_judged_by_what_it_has(
    run: Run, corpus: Path
) -> None:
    run.train(8, corpus)
    fields = ("epoch", "step", "lane", "ids")
    for number in range(LANES):
        run.edit(lane(number), lambda lines: [{k: line[k] for k in fields} for line in lines])
    run.heads = {}
    plan = json.loads((run.folder / "plan.json").read_bytes())
    del plan[0]["names"]
    (run.folder / "plan.json").write_text(json.dumps(plan))
    meta = json.dumps({"step": 8}).encode()
    (run.folder / "checkpoints/step_8/meta.json").write_bytes(meta)
    marker = run.folder / "checkpoints/step_8/COMMITTED"
    marker.write_text(hashlib.sha256(meta).hexdigest())
    assert audit(run.folder).clean
    assert audit(run.folder).quarantined == set(QUARANTINED)
    run.train(8, corpus)  # chained from here on
    assert audit(run.folder).clean
    run.edit(lane(1, 9), lambda lines: [{**line, "tensors": "x"} for line in lines])
    assert audit(run.folder).count == 8
    run.edit("quarantine.jsonl", lambda lines: [line for line in lines if line["id"] != "m7"])
    assert any(
        text.endswith("planned, not trained on, not quarantined: m7") for text in findings(run)
    )


def test_unreadable_lines_and_lanes_that_do_not_exist_are_found(run: Run, corpus: Path) -> None:
    run.train(8, corpus)
    path = run.folder / "ledger" / "lane_9.jsonl"
    path.write_text('{"epoch": 0, "step": 3, "lane": 9, "ids": ["x"]}\n{"step": 4}\n')
    said = " ".join(findings(run))
    assert "step 3, lane 9: there is no such lane: x" in said
    assert "lane_9.jsonl line 2: cannot be read" in said


def test_only_the_first_findings_are_shown_and_all_are_counted(
    run: Run, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.train(8, corpus)
    run.edit(lane(0), lambda lines: [])
    run.edit(lane(1), lambda lines: [])
    with pytest.raises(SystemExit) as left:
        main([str(run.folder)])
    assert left.value.code == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 12
    assert said[10] == "... and 6 more"
    assert said[11].startswith("audit: 16 findings: ")


def test_the_command_says_so_in_one_line_and_by_its_exit_code(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    run.train(4, corpus)

    def command(folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "raysft.audit", str(folder)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )

    done = command(run.folder)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stdout.startswith("audit: clean: 4 steps x 3 lanes")
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray"}  # seconds of waiting, and not needed
    run.edit(lane(2), lambda lines: lines[:-1])
    assert command(run.folder).returncode == 1
    done = command(tmp_path)
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert "name a run's folder" in done.stderr


def test_data_files_that_are_gone_are_an_error_not_a_finding(run: Run, corpus: Path) -> None:
    run.train(4, corpus)
    corpus.unlink()
    with pytest.raises(UserError, match=r"a\.json: its storage does not give it"):
        audit(run.folder)


class Losing(Plan):
    """A planner with a defect: row 5 is never dealt, row 6 twice."""

    def steps(self, cursor: Cursor) -> Iterator[PlannedStep]:
        for step in super().steps(cursor):
            lanes = [np.where(rows == 5, 6, rows) for rows in step.lanes]
            yield PlannedStep(step.epoch, step.step, lanes, step.after)


def test_a_plan_that_loses_or_repeats_examples_is_found_too() -> None:
    data, zeros = Data(lanes=2, tokens_per_batch=30, window=16), np.zeros(40, np.int16)
    plan = Losing(np.full(40, 10, np.int32), zeros, ["a"], zeros, [1.0], "i", data, 0)
    generations = Generations([Generation(0, 40, lambda: plan)])
    steps = itertools.takewhile(lambda step: step.epoch == 0, generations.steps(plan.start()))
    lines = [
        {"epoch": 0, "step": step.step, "lane": lane, "ids": [f"m{row}" for row in rows]}
        for step in steps
        for lane, rows in enumerate(step.lanes)
    ]
    report = Report(2)
    check(generations, lambda rows: [f"m{row}" for row in rows], lines, set(), 0, report)
    assert report.findings == [
        "epoch 0: left out of the plan: m5",
        "epoch 0: too often in the plan: m6",
    ]
    assert (report.lost, report.repeated) == (1, 1)


def test_a_long_ledger_is_not_held_in_memory() -> None:
    data, zeros = Data(lanes=4, tokens_per_batch=300, window=256), np.zeros(4000, np.int16)
    plan = Plan(np.full(4000, 30, np.int32), zeros, ["a"], zeros, [1.0], "i", data, 0)
    generations = Generations([Generation(0, 4000, lambda: plan)])

    def ids_of(rows: np.ndarray) -> list[str]:
        return [f"an example of number {row}" for row in rows]

    def lines(steps: int) -> Iterator[dict[str, Any]]:
        for step in itertools.islice(generations.steps(generations.start()), steps):
            for lane, rows in enumerate(step.lanes):
                yield {"epoch": step.epoch, "step": step.step, "lane": lane, "ids": ids_of(rows)}

    def peak(steps: int) -> int:
        report = Report(4)
        tracemalloc.start()
        check(generations, ids_of, lines(steps), set(), 0, report, chunk=500)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert report.clean
        assert report.steps == steps
        return found

    peak(100)  # what is imported and kept once
    tracemalloc.start()
    for _ in itertools.islice(generations.steps(generations.start()), 800):
        pass  # what planning holds, whoever asks
    planned = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak(800) - planned < 250_000  # their ids take 2.5 MB
    assert peak(1600) - planned < 250_000  # 5 MB
