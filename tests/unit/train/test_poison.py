"""Broken clips of every kind: each named once with its reason, the others read, nothing waits."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft.config import Config
from raysft.config.schema import Data, Model, Run, Source
from raysft.config.speech_tokens import SpeechTokens
from raysft.data.clips import stalled
from raysft.data.clips.audio import Limits, load
from raysft.data.clips.stalled import ClipReader, stuck
from raysft.data.encode import make_encoder
from raysft.data.example import Quarantined
from raysft.data.index.build import build_index
from raysft.data.quarantine import kind
from raysft.data.read.reader import Reader, Work
from raysft.driver.preflight import clips_of, prepare
from raysft.errors import BadExample, UserError
from tests.conftest import tone
from tests.support.models import AUDIO, CAUSAL

RATE = 16000


def write(path: Path, wave: np.ndarray, **kwargs: str) -> Path:
    soundfile.write(path, wave, RATE, **kwargs)
    before = time.time() - 60  # what was written just now is measured once more at the next start
    os.utime(path, (before, before))
    return path


def good(path: Path) -> Path:
    return write(path, tone(0.6, RATE, 300))


def cut(path: Path) -> Path:
    whole = write(path, np.random.default_rng(0).normal(0, 0.1, RATE))
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    return whole


def not_a_number(path: Path) -> Path:
    wave = tone(0.6, RATE, 300)
    wave[77] = np.nan
    return write(path, wave, subtype="FLOAT")


def loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


# File name, what makes it, and the kind of its reason.
BROKEN: tuple[tuple[str, Callable[[Path], object], str], ...] = (
    ("gone.wav", lambda path: None, "missing"),
    ("zero.wav", Path.touch, "empty"),
    ("text.wav", lambda path: path.write_text("<html>not found</html>" * 99), "not audio"),
    ("cut.wav", cut, "truncated"),
    ("cut.flac", cut, "truncated"),
    ("cut.mp3", cut, "truncated"),
    ("cut.ogg", cut, "truncated"),
    ("nan.wav", not_a_number, "NaN or infinite"),
    ("one.wav", lambda path: write(path, np.ones(1)), "too short"),
    ("5ms.flac", lambda path: write(path, tone(0.005, RATE, 300)), "too short"),
    ("silent.wav", lambda path: write(path, np.zeros(RATE)), "silent"),
    ("silent.ogg", lambda path: write(path, np.zeros(RATE)), "silent"),
    ("long.wav", lambda path: write(path, tone(2.1, RATE, 300)), "too long"),
    ("folder.wav", Path.mkdir, "folder"),
    ("fifo.wav", os.mkfifo, "not a file"),
    ("loop.wav", loop, "unreadable"),
)
EACH = 2  # of each kind, among 100


def corpus(folder: Path, broken: int = EACH) -> tuple[Path, dict[str, str], list[str]]:
    """A manifest of 100 clips in mixed order; the kinds of the broken by id, the good ones' ids."""
    folder.mkdir()
    kinds: dict[str, str] = {}
    for name, make, expected in BROKEN:
        for number in range(broken):
            make(folder / f"{number}-{name}")
            kinds[f"{number}-{name}"] = expected
    usable = [f"good{number}.wav" for number in range(100 - len(kinds))]
    for name in usable:
        good(folder / name)
    names = [*kinds, *usable]
    order = np.random.default_rng(0).permutation(len(names))
    return manifest(folder, [names[place] for place in order]), kinds, usable


def manifest(folder: Path, names: list[str]) -> Path:
    lines = [{"task_type": "asr", "wav_path": n, "text": "one two", "id": n} for n in names]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def reader_of(path: Path, run: Path, cache: Path | None = None, **data: float) -> Reader:
    encoder = make_encoder(Model(**AUDIO), Data(**data), run)
    index = build_index([Source(path=str(path))], "train", encoder, cache or run / "index")
    return Reader(index, encoder, int(index.tokens.sum()), 0)


def read_all(reader: Reader, size: int = 8) -> tuple[list[str], list[Quarantined]]:
    """Ids delivered, and all that are quarantined: by the index, then while reading."""
    rows = np.arange(len(reader.index))
    works = [Work(0, n, 0, rows[at : at + size]) for n, at in enumerate(range(0, len(rows), size))]
    batches = list(reader.read(iter(works)))
    found = [q for batch in batches for q in batch.quarantined]
    return [id_ for batch in batches for id_ in batch.ids], [*reader.index.rejected, *found]


def test_every_broken_clip_is_named_once_with_its_kind_and_every_good_one_is_read(
    tmp_path: Path,
) -> None:
    path, kinds, usable = corpus(tmp_path / "data")
    assert len(kinds) == 2 * len(BROKEN)
    ids, rejected = read_all(reader_of(path, tmp_path / "run", max_seconds=2.0))
    assert sorted(ids) == sorted(usable)
    assert sorted(q.id for q in rejected) == sorted(kinds)
    assert {q.id: kind(q.reason) for q in rejected} == kinds
    assert all(q.path == str(tmp_path / "data" / q.id) for q in rejected)
    assert all(q.path in q.reason for q in rejected)
    # Another run, other micro-batches, the index made anew or from the cache: the same list.
    for folder, size in ((tmp_path / "other", 3), (tmp_path / "run", 100)):
        again = read_all(reader_of(path, folder, max_seconds=2.0), size)
        assert again == (ids, rejected)


def test_a_third_of_the_clips_broken_stops_with_a_summary_by_kind(tmp_path: Path) -> None:
    path, kinds, _ = corpus(tmp_path / "data", broken=3)
    config = Config(
        run=Run(storage_path=str(tmp_path)),
        data=Data(train=[Source(path=str(path))], max_seconds=2.0, tokens_per_batch=512),
        model=Model(**AUDIO),
    )
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError) as caught:
        prepare(config, run)
    line = str(caught.value)
    # All but those whose headers are right: NaN and silence (two formats).
    found = len(kinds) - 3 * 3
    assert line.startswith(
        f"data.max_quarantined: {found} of 100 examples are unusable, more than 5.0%: "
        "12 truncated, 6 too short, 3 missing, 3 folder, 3 not a file, 3 unreadable, 3 empty, "
        "3 not audio, 3 too long; the first: "
    )
    assert "\n" not in line
    named = Path(line.split("all are named in ")[1])
    assert len(named.read_text().splitlines()) == found


def test_limits_of_length_choose_what_is_indexed_and_no_cache_hides_it(tmp_path: Path) -> None:
    names = ["0.2.wav", "0.5.wav", "0.9.wav"]
    for name in names:
        write(tmp_path / name, tone(float(name[:3]), RATE, 300))
    path = manifest(tmp_path, names)

    def ids(**limits: float) -> tuple[list[str], list[str], str]:
        index = reader_of(path, tmp_path, **limits).index
        return index.ids(np.arange(len(index))), [r.id for r in index.rejected], index.hash

    everything = ids()
    assert everything[:2] == (names, [])
    assert ids(min_seconds=0.3)[:2] == (names[1:], names[:1])
    assert ids(max_seconds=0.6)[:2] == (names[:2], names[2:])
    # What leaves the examples as they are leaves the plan: a run may go on with it.
    assert ids(max_seconds=1.0) == ids(min_seconds=0.2) == everything
    assert len({ids(min_seconds=0.3)[2], ids(max_seconds=0.6)[2], everything[2]}) == 3


def test_a_speech_tokenizer_is_fitted_on_the_clips_that_can_be_used(tmp_path: Path) -> None:
    path, _, usable = corpus(tmp_path / "data", broken=1)
    data = Data(train=[Source(path=str(path))], speech_tokens=SpeechTokens(), max_seconds=2.0)
    config = Config(run=Run(storage_path=str(tmp_path)), data=data, model=Model(**CAUSAL))
    assert len(list(clips_of(config))) == len(usable)
    config.data.tokens_per_batch = 14  # units of 40 ms: more than what a clip of 0.6 s takes
    assert list(clips_of(config)) == []


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """hold(path, ...): opening these regular files blocks while the process it returns lives.

    It has a write lease on them: the kernel lets no one else open them until it is given up, and
    that only a process can do that listens (after 45 s the kernel takes it).
    """
    script = (
        "import fcntl, os, signal, sys, time\n"
        "signal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        "held = [os.open(path, os.O_RDWR) for path in sys.argv[1:]]\n"
        "[fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK) for file in held]\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    holders: list[subprocess.Popen[str]] = []

    def start(*paths: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *map(str, paths)]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != "held\n":
            pytest.skip("this file system has no leases, by which a test makes a read block")
        return holder

    yield start
    for holder in holders:
        holder.kill()
        holder.wait()
    deadline = time.monotonic() + 10
    while stuck() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stuck() == 0  # threads come back when the storage does


def clips(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    return [good(folder / f"{number}.wav") for number in range(count)]


def test_a_read_that_never_returns_is_given_up_in_time_and_the_next_clips_are_read(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    """One bad clip does not block a job for hours (swift 9507)."""
    paths = clips(tmp_path / "data", 8)
    names = [path.name for path in paths]
    reader = reader_of(manifest(tmp_path / "data", names), tmp_path / "run", read_timeout_s=1.0)
    holder = hold(paths[3])
    before = time.monotonic()
    ids, rejected = read_all(reader)
    assert 1.0 <= time.monotonic() - before < 3.0
    assert ids == names[:3] + names[4:]
    assert [(q.id, kind(q.reason)) for q in rejected] == [(names[3], "stalled")]
    assert "within 1 s (data.read_timeout_s)" in rejected[0].reason
    assert stuck() == 1
    # Restarted, and read by another process at once: nothing is tried and waited for again.
    before = time.monotonic()
    assert read_all(replace(reader)) == (ids, rejected)
    holder.kill()  # nor does it change what a run has decided when the storage comes back
    assert read_all(reader_of(tmp_path / "data/train.jsonl", tmp_path / "run")) == (ids, rejected)
    assert time.monotonic() - before < 1.0
    # A new run tries it, and so does this one when its memory of the clip is deleted.
    assert read_all(reader_of(tmp_path / "data/train.jsonl", tmp_path / "new")) == (names, [])
    (mark,) = (tmp_path / "run" / "stalled").iterdir()
    assert f"delete {mark} to have it read again" in rejected[0].reason
    mark.unlink()
    assert read_all(reader) == (names, [])


def test_a_reader_that_is_running_learns_what_another_found_to_stall(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    paths = clips(tmp_path / "data", 4)
    path = manifest(tmp_path / "data", [path.name for path in paths])
    reader = reader_of(path, tmp_path / "run", read_timeout_s=0.5)
    other = replace(reader)
    hold(paths[1])
    found = read_all(reader)
    before = time.monotonic()
    assert read_all(other) == found
    assert time.monotonic() - before < 0.5


def test_an_index_leaves_out_a_clip_whose_header_cannot_be_read_in_time(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    paths = clips(tmp_path / "data", 40)
    names = [path.name for path in paths]
    path = manifest(tmp_path / "data", names)
    holder = hold(paths[5])
    before = time.monotonic()
    first = reader_of(path, tmp_path / "run", tmp_path / "cache", read_timeout_s=1.0).index
    assert 1.0 <= time.monotonic() - before < 3.0
    assert [(q.id, kind(q.reason)) for q in first.rejected] == [("5.wav", "stalled")]
    assert first.ids(np.arange(39)) == names[:5] + names[6:]
    holder.kill()
    again = reader_of(path, tmp_path / "run", tmp_path / "cache", read_timeout_s=1.0).index
    assert (again.hash, again.rejected) == (first.hash, first.rejected)
    assert len(reader_of(path, tmp_path / "new", tmp_path / "cache").index) == 40


def test_a_storage_that_is_gone_stops_the_run_and_does_not_use_up_its_clips(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    paths = clips(tmp_path / "data", 20)
    path = manifest(tmp_path / "data", [path.name for path in paths])
    reader = reader_of(path, tmp_path / "run", read_timeout_s=0.2)
    hold(*paths)
    with pytest.raises(UserError, match=r"3\.wav: no answer within 0\.2 s .* is mounted"):
        read_all(reader)
    assert len(list((tmp_path / "run/stalled").iterdir())) == stuck() == stalled.IN_A_ROW


def test_good_clips_between_bad_ones_show_that_the_storage_answers(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    paths = clips(tmp_path / "data", 12)
    names = [path.name for path in paths]
    reader = reader_of(manifest(tmp_path / "data", names), tmp_path / "run", read_timeout_s=0.2)
    hold(*paths[::2])
    ids, rejected = read_all(reader)
    assert (ids, [q.id for q in rejected]) == (names[1::2], names[::2])
    assert stuck() == 6


def test_reasons_do_not_depend_on_what_other_threads_read(tmp_path: Path) -> None:
    makes = (good, cut, lambda path: path.write_text("<html>"), lambda path: path.write_text(""))
    for number in range(64):
        makes[number % 4](tmp_path / f"{number}.{('wav', 'flac', 'ogg')[number % 3]}")
    paths = sorted(map(str, tmp_path.iterdir()))
    reader = ClipReader(Limits())
    alone = list(map(str, reader.each(partial(load, rate=RATE), paths)))
    with ThreadPoolExecutor(8) as pool:
        one = partial(reader.each, partial(load, rate=RATE))
        together = [str(found) for (found,) in pool.map(one, [[path] for path in paths * 5])]
    assert together == alone * 5


def test_a_thread_serves_all_clips_and_is_left_only_when_it_hangs(tmp_path: Path) -> None:
    reader = ClipReader(Limits())
    reader.call(str.upper, "a")
    threads = threading.active_count()
    assert [reader.call(str.upper, "b") for _ in range(1000)] == ["B"] * 1000
    assert reader.each(str.upper, [*"abc"]) == [*"ABC"]
    assert threading.active_count() == threads


def test_a_defect_is_raised_and_not_taken_for_a_bad_clip() -> None:
    with pytest.raises(ZeroDivisionError):
        ClipReader(Limits()).call(lambda path: 1 / 0, "a")
    with pytest.raises(BadExample, match="no such file"):
        ClipReader(Limits()).call(partial(load, rate=RATE), "/none.wav")


def _slow(path: str) -> str:
    for _ in range(10):
        time.sleep(0.05)
    return path


def _read_slowly() -> None:
    print("reading", flush=True)
    print(ClipReader(Limits(read_timeout_s=1.2)).call(_slow, "read"), flush=True)


def test_a_process_that_was_stopped_for_a_while_gives_no_clip_up() -> None:
    code = "from tests.unit.train.test_poison import _read_slowly as read; read()"
    reading = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert reading.stdout is not None
    assert reading.stdout.readline() == "reading\n"
    time.sleep(0.2)
    reading.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    reading.send_signal(signal.SIGCONT)
    assert reading.stdout.readline() == "read\n"
    assert reading.wait() == 0


def _call_in_child() -> None:
    assert ClipReader(Limits(read_timeout_s=5)).call(str.upper, "a") == "A"


def test_a_forked_process_has_threads_of_its_own() -> None:
    _call_in_child()  # leaves a thread idle, which the child does not have
    child = multiprocessing.get_context("fork").Process(target=_call_in_child)
    child.start()
    child.join(20)
    assert child.exitcode == 0
