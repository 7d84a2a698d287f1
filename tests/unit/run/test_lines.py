"""Files of JSON lines: what cuts a line or spoils it costs that line, and is said."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
from pathlib import Path

import pytest

from raysft.run import lines as module
from raysft.run.ledger import Ledger, genesis
from raysft.run.lines import Lines, cut_back, read_lines
from raysft.train.metrics import cut_back_run, last_recorded

TORN = {
    "garbage": b"garbage",
    "half a character": '{"step": 2, "ids": ["訓'.encode()[:-1],
    "no UTF-8": b'{"step": 2, "ids": ["\xff\xfe"]}',
    "zeros": b"\0" * 4096,
    "half a line": b'{"step": 2, "ids"',
    "a list": b"[1, 2]",
    "nothing": b"",
    "brackets": b"[" * 100_000,
    "digits": b'{"step": ' + b"9" * 5000 + b"}",
}


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_told", set())


def ledger(folder: Path, steps: int) -> Path:
    """One lane's file, of ids that are not ASCII."""
    found = Ledger(folder, [0], 1, {0: genesis("a", 0)})
    for step in range(1, steps + 1):
        found.write(0, step, 0, [f"訓練:{step}", f"données/é{step}"])
    found.close()
    (path,) = (folder / "ledger").iterdir()
    return path


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


@pytest.mark.parametrize("torn", TORN.values(), ids=TORN)
def test_a_damaged_line_in_the_middle_costs_itself_and_is_said_once(
    torn: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn + b'\n{"step": 3}\n{"step": 4}\n')
    with caplog.at_level(logging.WARNING):
        assert steps_of(path) == [1, 3, 4]
        assert steps_of(path) == [1, 3, 4]
    (said,) = caplog.messages
    assert said.startswith(f"{path}: damaged, and left out: line 2 (")
    assert (cut_back(path, 3) or "").startswith(f"{path}: damaged, and left out: line 2 (")
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    assert cut_back(path, 3) is None


def test_a_file_cut_at_any_byte_is_read_cut_back_and_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # 2,000 of them take 10 s
    path = ledger(tmp_path, 30)
    whole = path.read_bytes()
    assert len(whole) > 1500
    for size in range(len(whole) - 1024, len(whole)):
        path.write_bytes(whole[:size])
        kept = whole[: size + 1] if whole[size : size + 1] == b"\n" else whole[:size]
        sound = kept.count(b"\n")  # a line that lacks but its newline is whole
        assert steps_of(path) == list(range(1, sound + 1))
        assert last_recorded(tmp_path) == sound
        step = sound - 1
        lost = cut_back_run(tmp_path, step)
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:step])
        assert bool(lost) == (not kept.endswith(b"\n"))
        path.write_bytes(whole[:size])
        out = Lines(path)
        out.write({"step": 99})
        out.close()
        assert steps_of(path) == [*range(1, sound + 1), 99]


def test_what_is_kept_is_kept_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = b'{"step":1,  "x": 1e3}\n{"step": 2, "y": "\\u00e9"}\r\n{"step": 9}\n'
    path.write_bytes(content)
    cut_back(path, 2)
    assert path.read_bytes() == content[: content.index(b'{"step": 9')]


def test_a_line_that_is_being_written_is_not_called_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert steps_of(path) == [1]
    assert not caplog.messages
    Lines(path).close()  # but whoever writes on takes it away, and says so
    assert path.read_bytes() == b'{"step": 1}\n'
    assert caplog.messages == [f"{path}: damaged, and left out: line 2 (cut off)"]


def test_lines_without_the_fields_that_are_needed_are_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": "2"}\n{"step": true}\n{"loss": 1}\n{"step": 5}\n')
    assert [line["step"] for line in read_lines(path, {"step": int})] == [1, 5]
    cut_back(path, 4)  # it goes by steps: only a step that is no number is damage to it
    assert path.read_bytes() == b'{"step": 1}\n{"loss": 1}\n'


def test_texts_that_are_no_unicode_come_back_as_they_were(tmp_path: Path) -> None:
    name = os.fsdecode(b"latin-\xe9:3")  # a file's name may be any bytes
    out = Lines(tmp_path / "a.jsonl")
    out.write({"step": 1, "id": name})
    out.write({"step": 2, "id": "訓練:3"})
    out.close()
    assert [line["id"] for line in read_lines(tmp_path / "a.jsonl")] == [name, "訓練:3"]


def test_a_line_that_no_longer_fits_leaves_nothing_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    out = Lines(path)
    out.write({"step": 1, "ids": ["x" * 50]})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # the file may not grow beyond
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            out.write({"step": 2, "ids": ["訓" * 50]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes().count(b"\n") == 1
    assert path.read_bytes().endswith(b"\n")
    out.write({"step": 2})
    assert [line["step"] for line in map(json.loads, path.read_bytes().splitlines())] == [1, 2]
