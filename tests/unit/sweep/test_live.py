"""A sweep's page while its trials train."""

from __future__ import annotations

import csv
import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raysft.run.lines import Lines
from raysft.sweep.folder import SweepFolder
from raysft.sweep.live import Live
from tests.support.worlds import start, tiny
from tests.unit.sweep.test_table import METRIC, make
from tests.unit.train.test_checkpoint import ONE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    """One of a trial that runs and one that has not begun."""
    found = make(tmp_path / "sweep", 1, ("running", {2: 0.5}), ("waiting", {}))
    run = found.run(found.trial(0))
    config = tiny(tmp_path, run.name, run__storage_path=str(run.parent), run__name=run.name)
    (run / "eval.jsonl").rename(tmp_path / "eval.jsonl")  # a folder that is no run's yet
    start(config, ONE)
    (tmp_path / "eval.jsonl").rename(run / "eval.jsonl")
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 1.5}\n')
    return found


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def value(sweep: SweepFolder) -> str:
    if not (sweep.path / "results.csv").is_file():
        return ""
    with open(sweep.path / "results.csv", newline="") as lines:
        return {row["trial"][:4]: row[METRIC] for row in csv.DictReader(lines)}["0000"]


def evaluated(sweep: SweepFolder, step: int, figure: float) -> None:
    lines = Lines(sweep.run(sweep.trial(0)) / "eval.jsonl")
    lines.write({"step": step, METRIC: figure})
    lines.close()


def test_it_is_written_at_news_and_no_oftener_than_it_may(sweep: SweepFolder) -> None:
    page = sweep.path / "report.html"
    live = Live(sweep, METRIC, "min", every_s=1.0)
    pickle.dumps(live)  # Ray Tune does so
    assert not page.exists()
    live.new()
    wait(page.is_file)
    begun = time.monotonic()
    assert value(sweep) == "0.5" and sweep.trial(0).name in page.read_text()
    for step in range(3, 9):
        evaluated(sweep, step, step / 10)
        live.new()
    wait(lambda: value(sweep) == "0.8")
    assert time.monotonic() - begun > 0.9, "news are gathered"
    live.close()
    evaluated(sweep, 9, 0.9)
    live.new()
    time.sleep(0.2)
    assert value(sweep) == "0.8", "closed, it writes no more"


def test_what_fails_is_warned_of_and_tried_again(
    sweep: SweepFolder, caplog: pytest.LogCaptureFixture
) -> None:
    state = sweep.path / "states" / f"{sweep.trial(1).name}.json"
    good = state.read_bytes()
    state.write_text("{")
    live = Live(sweep, METRIC, "min", every_s=0.01)
    with caplog.at_level(logging.WARNING):
        live.new()
        wait(lambda: "results.csv was not written" in caplog.text)
    assert state.name in caplog.text
    state.write_bytes(good)
    (sweep.path / "report.html").mkdir()  # where the page cannot be
    live.new()
    wait(lambda: "report.html was not written" in caplog.text)
    (sweep.path / "report.html").rmdir()
    live.new()
    wait((sweep.path / "report.html").is_file)
    live.close()
