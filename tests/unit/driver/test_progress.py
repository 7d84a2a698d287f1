"""What a user sees of training on the terminal: a line of 80 columns, and a time that is right."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest

from raysft.progress import ProgressLine, TimeLeft, step_line


def report(step: int = 150, total: int = 600, **changes: Any) -> dict[str, Any]:
    """A line of metrics as a worker reports it."""
    return {
        "step": step,
        "total_steps": total,
        "steps": 10,
        "epoch": 2,
        "loss": 2.30259,
        "lr": 1.5e-3,
        "tokens_per_s": 9120.4,
        "data_wait": 0.031,
        "seconds": 5.0,
        "at": 1000.0 + step,
        **changes,
    }


def test_a_line_carries_step_loss_epoch_rate_speed_wait_and_time() -> None:
    assert step_line(report(), 190.0) == (
        "step 150/600  loss 2.3026  epoch 2  lr 0.0015  9,120 tok/s  wait 3%  eta 3:10"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        """All that was ever shown, without what moves the cursor or colours."""
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())
        return [row for row in re.split(r"[\r\n]+", plain) if row.strip()]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mfu": 0.4123},
        {"step": 123_456, "total": 1_000_000, "loss": 12345.6789, "mfu": 0.5, "data_wait": 1.0},
        {"tokens_per_s": 123_456_789.0, "epoch": 1234, "lr": 1.23456e-05, "mfu": 1.0},
        {"loss": float("nan"), "step": 9_999_999, "total": 10_000_000, "tokens_per_s": 1e9},
    ],
)
def test_every_line_fits_80_columns_and_keeps_its_head_and_its_time(
    changes: dict[str, Any], live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    line = report(**changes)
    out = Terminal() if live else io.StringIO()
    show = ProgressLine(out, every_s=0.0)
    show(report(**{**changes, "step": line["step"] - 10, "at": 500.0}))
    show(line)
    show.close()
    rows = out.rows() if isinstance(out, Terminal) else out.getvalue().splitlines()
    steps = [row for row in rows if row.startswith("step ")]
    assert len({row.split("/")[0] for row in steps}) == 2
    for row in rows:
        assert len(row) < 80
    for row in steps:
        assert re.match(r"step \d+/\d+  loss \S+  epoch \d+  ", row)
        assert "  eta " in row


def test_a_terminal_keeps_phases_with_their_times_and_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with ProgressLine(out) as show:
        show({"doing": "loading the tokenizer [fast]"})
        time.sleep(0.15)
        show({"doing": "waiting for the first batch"})
        assert "\x1b[?25l" in out.getvalue(), "the cursor is hidden while lines renew themselves"
        show({"began": 1})
        show(report(step=1, total=2))
        show(report(step=2, total=2))
    kept = [row for row in out.rows() if re.match(r" +\d\.\d s  ", row)]
    assert re.fullmatch(r"   0\.[12] s  loading the tokenizer \[fast\] *", kept[0])
    assert "waiting for the first batch" in out.getvalue()
    assert any(row.startswith("first step after ") for row in out.rows())
    assert any(row.startswith("step 2/2") for row in out.rows())
    assert out.getvalue().rstrip("\r").endswith("\x1b[?25h"), "and seen again"


def test_without_a_terminal_the_times_of_the_phases_follow_the_first_step() -> None:
    out = io.StringIO()
    show = ProgressLine(out, every_s=0.0)
    show({"doing": "loading the tokenizer"})
    time.sleep(0.15)
    show({"doing": "a remark"})
    show({"doing": "waiting for the first batch"})
    time.sleep(0.15)
    show({"began": 1})
    show(report(step=2, total=3))
    show({"began": 2})  # after a restart
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["loading the tokenizer", "a remark", "waiting for the first batch"]
    total = float(re.fullmatch(r"first step after (\S+) s", lines[3])[1])  # type: ignore[index]
    phases = [re.fullmatch(r" +(\S+) s  (.+)", line) for line in lines[4:-1]]
    took = {phase[2]: float(phase[1]) for phase in phases if phase}
    assert list(took) == [
        "starting Python",
        "loading the tokenizer",
        "waiting for the first batch",
    ]
    assert sum(took.values()) == pytest.approx(total, abs=0.3)
    assert lines[-1].startswith("step 2/3")


def test_how_far_a_phase_is_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with ProgressLine(out) as show:
        show({"doing": "indexing data.train: 1 source"})
        show({"doing": "indexing data.train: measuring", "share": 0.25})
        time.sleep(0.15)
        shown = out.getvalue()
        show({"doing": "planning batches"})
    assert "measuring" in shown and "25%" in shown and "━" in shown
    kept = [row for row in out.rows() if re.match(r" +\d\.\d s  ", row)]
    assert re.fullmatch(r"   0\.[1-9] s  indexing data.train: 1 source *", kept[0]), "one phase"
    assert len(kept) == 1


def test_how_far_a_phase_is_is_a_line_every_few_seconds_elsewhere() -> None:
    out = io.StringIO()
    show = ProgressLine(out, every_s=0.1)
    show({"doing": "indexing data.train: 1 source"})
    for share in (0.25, 0.26):
        show({"doing": "indexing data.train: measuring", "share": share})
    time.sleep(0.15)
    show({"doing": "indexing data.train: measuring", "share": 0.5})
    assert out.getvalue().splitlines()[1:] == [
        "indexing data.train: measuring: 25%",
        "indexing data.train: measuring: 50%",
    ]


def test_a_terminal_that_cannot_renew_lines_gets_plain_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    show = ProgressLine(out)
    show({"doing": "loading the tokenizer"})
    show.close()
    assert out.getvalue() == "loading the tokenizer\n"


def test_the_time_left_is_not_told_before_it_can_be_right() -> None:
    left = TimeLeft()
    assert left.seconds(1000) is None
    left.add(10, 10, at=300.0)  # five minutes of start-up and compiling
    assert left.seconds(1000) is None
    left.add(12, 2, at=310.0)
    assert left.seconds(1000) is None, "two steps say little"
    left.add(30, 18, at=320.0)
    assert left.seconds(1000) == pytest.approx(970.0), "a step a second"
    left.add(40, 10, at=350.0)  # an evaluation in between belongs to the pace
    assert left.seconds(1000) == pytest.approx(960 * 50 / 30)
    left.add(35, 5, at=900.0)  # started again from step 30: what that took is not the pace
    assert left.seconds(1000) is None
    left.add(45, 10, at=920.0)
    assert left.seconds(1000) == pytest.approx(955 * 2.0)


def test_times_are_read_at_a_glance() -> None:
    for seconds, shown in [(5, "0:05"), (3599, "59:59"), (7265, "2:01:05"), (183_720, "2d 03:02")]:
        assert step_line(report(), float(seconds)).endswith(f"eta {shown}")
    assert step_line(report(), None).endswith("eta --:--")


def test_stages_and_the_summary_are_lines_of_their_own() -> None:
    out = io.StringIO()
    show = ProgressLine(out)
    show({"doing": "indexing data.train: 1 source"})
    show({"summary": ["train   60 examples", "model   840 parameters, 12 of them train"]})
    assert out.getvalue().splitlines() == [
        "indexing data.train: 1 source",
        "train   60 examples",
        "model   840 parameters, 12 of them train",
    ]
