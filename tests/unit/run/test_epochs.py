"""Epochs are counted once: what they came to is kept, and is what counting anew would say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysft.data.plan.plan import Plan
from raysft.parallel import World
from raysft.run import epochs
from tests.support import worlds


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Epochs that are counted, one after the other; all of them are kept."""
    monkeypatch.setattr(epochs, "LONG_S", 0.0)
    found: list[int] = []
    summarise = Plan.summarise

    def seen(self: Plan, epoch: int, start: object) -> object:
        found.append(epoch)
        return summarise(self, epoch, start)

    monkeypatch.setattr(Plan, "summarise", seen)
    return found


def steps(folder: Path, **changes: object) -> int:
    config = worlds.tiny(folder, train__max_steps=None, train__epochs=3, **changes)
    return worlds.start(config, World.current()).total_steps


def test_a_second_start_counts_nothing_and_says_the_same(
    counted: list[int], tmp_path: Path
) -> None:
    first = steps(tmp_path)
    assert counted == [0, 1, 2]
    assert len(json.loads((tmp_path / "runs" / "run" / "epochs.json").read_bytes())) == 3
    assert steps(tmp_path) == first
    assert counted == [0, 1, 2]


def test_another_plan_is_counted_for_itself(counted: list[int], tmp_path: Path) -> None:
    first = steps(tmp_path)
    more = steps(tmp_path, data__tokens_per_batch=80)
    assert more > first and counted == [0, 1, 2] * 2
    assert steps(tmp_path) == first and counted == [0, 1, 2] * 2


@pytest.mark.parametrize("content", ["{", "[]", '{"a": {"summary": {}, "after": 1}}', '{"a": 1}'])
def test_a_damaged_file_is_said_and_counted_anew(
    content: str, counted: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = steps(tmp_path)
    (tmp_path / "runs" / "run" / "epochs.json").write_text(content)
    assert steps(tmp_path) == first
    assert counted == [0, 1, 2] * 2
    assert "epochs.json: is damaged" in caplog.text


def test_what_is_counted_in_no_time_is_not_written_down(tmp_path: Path) -> None:
    steps(tmp_path)
    assert not (tmp_path / "runs" / "run" / "epochs.json").exists()
