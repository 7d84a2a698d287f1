"""Files of JSON lines: what cuts a line or spoils it costs that line, and is said."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysft.errors import UserError
from raysft.run import ledger as ledger_module
from raysft.run import lines as module
from raysft.run.ledger import Chains, Ledger, files, genesis
from raysft.run.lines import Lines, cut_back, last_step, read_lines
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


def bytes_read() -> int:
    """By this process so far, from the page cache too."""
    (line,) = [x for x in Path("/proc/self/io").read_text().splitlines() if x.startswith("rchar")]
    return int(line.split()[1])


@given(
    steps=st.lists(st.integers(1, 30), max_size=40).map(sorted),
    early=st.lists(st.integers(0, 40), max_size=6),  # where lines of step 0 lie
    spoilt=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(list(TORN.values()))), max_size=3
    ),
    cut=st.integers(0, 300),
    step=st.integers(0, 31),
    block=st.integers(1, 64),
    huge=st.sampled_from([0, 100, 1 << 30]),
    in_place=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_seeking_from_the_end_keeps_what_reading_it_all_would_keep(
    steps: list[int],
    early: list[int],
    spoilt: list[tuple[int, bytes]],
    cut: int,
    step: int,
    block: int,
    huge: int,
    in_place: bool,
) -> None:
    lines = [b'{"step": %d, "id": "\xc3\xa9"}\n' % number for number in steps]
    for at in early:
        lines.insert(at, b'{"id": "a", "step": 0}\n')
    for at, torn in spoilt:
        lines.insert(at, torn[:200] + b"\n")
    content = b"".join(lines)
    content = content[: max(0, len(content) - cut)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        cut_back(path, step)  # of a short file every line is parsed
        expected = read_lines(path)
        path.write_bytes(content)
        for name, value in {"SHORT": -1, "HUGE": huge, "_BLOCK": block, "_COPIED": block}.items():
            patch.setattr(module, name, value)
        patch.setattr(os, "fsync", lambda handle: None)
        cut_back(path, step, in_place)
        # It need not look at damaged lines that lie before what it drops: readers leave them out.
        assert read_lines(path) == expected
        assert path.read_bytes()[-1:] in (b"\n", b"")
        assert last_step(path) == (expected[-1]["step"] if expected else 0)


@pytest.mark.parametrize("huge", [True, False], ids=["in place", "copied"])
def test_cutting_a_long_file_back_parses_its_end_alone(
    huge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HUGE", (1 << 24) if huge else 1 << 30)
    path, parsed = tmp_path / "lane_0_from_1.jsonl", 0
    with open(path, "wb") as out:
        for step in range(1, 200_001):
            out.write(b'{"epoch": 0, "step": %d, "lane": 0, "ids": ["%0100d"]}\n' % (step, step))
    size, real = path.stat().st_size, module.parse

    def counted(raw: bytes, kinds: module.Kinds | None = None) -> module.Line:
        nonlocal parsed
        parsed += 1
        return real(raw, kinds)

    monkeypatch.setattr(module, "parse", counted)
    inode, before = path.stat().st_ino, bytes_read()
    assert last_step(path) == 200_000
    assert cut_back(path, 199_000, in_place=True) is None
    read = bytes_read() - before
    assert last_step(path) == 199_000
    assert parsed < 3_000
    assert size > 25 << 20
    if huge:
        assert read < 1 << 20
    else:
        assert read < size + (1 << 20) and path.stat().st_ino != inode


def test_a_lane_goes_on_in_another_file_before_one_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "FULL", 1000)
    asked: list[int] = []
    written = Ledger(
        tmp_path, [0, 1], 1, {lane: genesis("a", lane) for lane in (0, 1)}, lambda: asked.append(1)
    )
    for step in range(1, 101):
        for lane in (0, 1):
            written.write(0, step, lane, [f"{step}:{lane}"])
    written.sync()
    written.close()
    for lane, own in files(tmp_path).items():
        assert len(own) > 10
        chains = Chains("a", {}, whole=True)
        ends = [first for first, _ in own[1:]] + [101]
        for (first, path), end in zip(own, ends):
            assert path.stat().st_size < 1300
            lines = read_lines(path)
            assert [line["step"] for line in lines] == list(range(first, end))
            assert [chains.follow(line) for line in lines] == [None] * len(lines)
            assert {line["lane"] for line in lines} == {lane}
    assert len(asked) == sum(len(own) - 1 for own in files(tmp_path).values())
    inodes = {path: path.stat().st_ino for own in files(tmp_path).values() for _, path in own}
    assert last_recorded(tmp_path) == 100
    cut_back_run(tmp_path, 50)
    for own in files(tmp_path).values():
        assert read_lines(own[-1][1])[-1]["step"] == 50
        assert own[-1][1].stat().st_ino != inodes[own[-1][1]]  # who still writes there, writes away
        assert all(path.stat().st_ino == inodes[path] for _, path in own[:-1])


def test_who_lost_the_run_writes_no_line_into_a_file_that_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "FULL", 1)

    def refuse() -> None:
        raise UserError("another job has taken over")

    written = Ledger(tmp_path, [0], 1, {0: genesis("a", 0)}, refuse)
    written.write(0, 1, 0, ["a"])
    with pytest.raises(UserError, match="taken over"):
        written.write(0, 2, 0, ["b"])
    written.close()
    names = {path.name: path.stat().st_size for path in (tmp_path / "ledger").iterdir()}
    assert names["lane_0_from_2.jsonl"] == 0
    assert [first for first, _ in files(tmp_path)[0]] == [1]  # it is as if it were not there
    cut_back_run(tmp_path, 5)
    assert [path.name for path in (tmp_path / "ledger").iterdir()] == ["lane_0_from_1.jsonl"]


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
