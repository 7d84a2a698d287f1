"""Storage that fails for a moment costs the moment; storage that stays away ends the run in a line;
only what is wrong in a file itself leaves an example out."""

from __future__ import annotations

import errno
import io
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from raysft import patience
from raysft.config import Config
from raysft.config.schema import Data, Model, Source
from raysft.data.clips import audio
from raysft.data.encode import make_encoder
from raysft.data.example import MicroBatch
from raysft.data.index import part
from raysft.data.index.build import Index, build_index
from raysft.data.read.reader import Reader, Work
from raysft.data.sources import json_lines, resolve
from raysft.errors import BadExample, UserError
from tests.conftest import tone
from tests.support.audio_files import KINDS, encoded, ffmpeg
from tests.support.batches import differences
from tests.support.models import AUDIO

RATE = 16000
SUFFIXES = ("wav", "flac", "ogg", "mp3", "aiff", "au")
MOMENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.ENOENT, errno.ENOTDIR)


class Faults:
    """Fails calls of the system on files whose path ends in a text: `calls[name]` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: Counter[str] = Counter()
        self.ending, self.number = "", errno.EIO
        self.short = False  # pread gives half of what is asked for, once, and then says: the end
        self._paths: dict[int, str] = {}
        for name in ("stat", "open", "pread", "fstat", "listdir"):
            monkeypatch.setattr(os, name, self._failing(name, getattr(os, name)))
        monkeypatch.setattr("builtins.open", self._failing("io", open))
        monkeypatch.setattr(io, "open", self._failing("io", io.open))  # pathlib's

    def __call__(self, ending: str, number: int = errno.EIO, **calls: int) -> None:
        """From now on so many calls fail on that file, each name on its own."""
        self.ending, self.number, self.left = ending, number, Counter(calls)

    def _failing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            path = self._paths.get(target, "") if type(target) is int else os.fspath(target)
            hit = bool(self.ending) and str(path).endswith(self.ending)
            if hit and self.left[name] > 0:
                self.left[name] -= 1
                raise OSError(self.number, os.strerror(self.number), path)
            if hit and name == "pread" and self.short:
                return real(target, args[0], args[1])[: args[0] // 2] if args[1] == 0 else b""
            found = real(target, *args, **kwargs)
            if name == "open":
                self._paths[found] = str(path)
            return found

        return call


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made: a clock that only they move."""
    made: list[float] = []

    class Clock:
        monotonic = staticmethod(lambda: sum(made))
        sleep = staticmethod(made.append)

    monkeypatch.setattr(patience, "time", Clock)
    return made


def corpus(folder: Path) -> Path:
    """Clips of every kind of container; returns the manifest."""
    folder.mkdir()
    lines = []
    for number, suffix in enumerate(SUFFIXES):
        path = folder / f"clip{number}.{suffix}"
        soundfile.write(path, tone(0.5 + 0.1 * number, RATE, 300 + number), RATE)
        lines.append(f'{{"task_type": "asr", "wav_path": "{path.name}", "text": "t {number}"}}\n')
    (folder / "train.jsonl").write_text("".join(lines))
    return folder / "train.jsonl"


def make_reader(manifest: Path, seed: int = 0) -> Reader:
    encoder = make_encoder(Model(**AUDIO), Data(), manifest.parent)
    folder = manifest.parent / "index"
    index = build_index([Source(path=str(manifest))], "train", encoder, folder)
    return Reader(index, encoder, int(index.tokens.sum()), seed)


def everything(reader: Reader) -> MicroBatch:
    return next(reader.read_chunk([Work(0, 1, 0, np.arange(len(reader.index)))]))


def failing_times(count: int, number: int = errno.EIO) -> Callable[[], str]:
    left = [OSError(number, os.strerror(number)) for _ in range(count)]

    def call() -> str:
        if left:
            raise left.pop()
        return "read"

    return call


def test_pauses_grow_and_end_with_the_time_that_is_allowed(pauses: list[float]) -> None:
    patience.allow(30)
    with pytest.raises(OSError, match="Input/output"):
        patience.patiently(failing_times(10_000), "a")
    assert sum(pauses) == pytest.approx(30)
    assert pauses[:4] == [0.05, 0.1, 0.2, 0.4]
    assert max(pauses) <= 2.0
    assert len(pauses) < 30  # storage in trouble is not asked all the time
    pauses.clear()
    assert patience.patiently(failing_times(8), "a") == "read"
    assert sum(pauses) < 30


def test_without_patience_every_file_is_tried_once(pauses: list[float]) -> None:
    patience.allow(0)
    with pytest.raises(UserError, match=r"a: its storage .* \(data\.retry_s=0\): see that"):
        patience.known(failing_times(1), "a")
    assert pauses == []


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG])
def test_what_is_wrong_with_a_path_is_not_waited_for(pauses: list[float], number: int) -> None:
    for call in (patience.patiently, patience.known):
        with pytest.raises((OSError, UserError)):
            call(failing_times(1, number), "a")
    assert pauses == []


def test_a_file_that_may_be_absent_is_not_waited_for(pauses: list[float]) -> None:
    with pytest.raises(FileNotFoundError):
        patience.patiently(failing_times(1, errno.ENOENT), "a")
    assert pauses == []
    assert patience.known(failing_times(1, errno.ENOENT), "a") == "read"


def test_nobody_waits_twice_for_the_same_error(pauses: list[float]) -> None:
    patience.allow(30)
    with pytest.raises(OSError, match="Input/output"):
        patience.patiently(lambda: patience.patiently(failing_times(10_000), "a"), "b")
    assert sum(pauses) == pytest.approx(30)


def test_it_is_said_once_for_what_a_process_waits(caplog: pytest.LogCaptureFixture) -> None:
    patience.allow(5)
    back = threading.Event()

    def call() -> None:
        if not back.is_set():
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    threads = [
        threading.Thread(target=patience.known, args=(call, f"/mnt/{number}.wav"))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    while not caplog.messages:
        time.sleep(0.01)
    time.sleep(0.2)
    back.set()
    for thread in threads:
        thread.join(5)
    (said,) = caplog.messages
    assert "waiting up to 5 s (data.retry_s) for /mnt/" in said
    assert "Stale file handle" in said


def test_waiting_never_makes_a_worker_count_as_hung() -> None:
    config = Config.model_validate({"data": {"retry_s": 600}, "parallel": {"timeout_s": 300}})
    assert config.patience_s == 150
    assert Config().patience_s == patience.SECONDS == 30


def test_an_indexed_clip_is_read_when_its_storage_is_back(tmp_path: Path, faults: Faults) -> None:
    reader = make_reader(corpus(tmp_path / "data"))
    before = everything(reader)
    for place, number in enumerate(MOMENT):
        for call in ("stat", "open", "fstat", "pread"):
            faults(SUFFIXES[place], number, **{call: 2})
            assert differences(everything(reader), before) == []
            assert not faults.left[call]


def test_a_clip_that_is_gone_ends_the_run_in_a_line_and_quarantines_nothing(
    tmp_path: Path,
) -> None:
    reader = make_reader(corpus(tmp_path / "data"))
    clip = tmp_path / "data" / "clip2.ogg"
    kept = clip.read_bytes()
    clip.unlink()
    with pytest.raises(UserError) as caught:
        everything(reader)
    (said,) = str(caught.value).splitlines()
    assert said.startswith(f"{clip}: its storage does not give it on ")
    assert "No such file or directory, tried for 0.2 s (data.retry_s)" in said
    assert "put an empty file in its place" in said
    clip.write_bytes(b"")  # what the line says to do
    assert [(q.path, "empty file" in q.reason) for q in everything(reader).quarantined] == [
        (str(clip), True)
    ]
    clip.write_bytes(kept)
    assert everything(reader).quarantined == []


def test_a_mount_that_is_away_for_a_moment_drops_no_clip(tmp_path: Path) -> None:
    patience.allow(10)
    reader = make_reader(corpus(tmp_path / "data"))
    before = everything(reader)
    os.rename(tmp_path / "data", tmp_path / "away")
    timer = threading.Timer(0.5, os.rename, (tmp_path / "away", tmp_path / "data"))
    timer.start()
    assert differences(everything(reader), before) == []
    timer.join()


def test_a_pause_is_no_stall(tmp_path: Path, faults: Faults) -> None:
    """Reads that fail at once are tried for longer than one read may take."""
    patience.allow(10)
    manifest = corpus(tmp_path / "data")
    reader = make_reader(manifest)
    reader.encoder.limits = audio.Limits(read_timeout_s=0.4, stalled=str(tmp_path / "stalled"))
    reader = Reader(reader.index, reader.encoder, reader.budget, 0)
    faults("clip1.flac", errno.EIO, open=6)  # 0.05 + ... + 1.6 s of pauses
    begun = time.monotonic()
    assert everything(reader).quarantined == []
    assert time.monotonic() - begun > 2 * 0.4
    assert not (tmp_path / "stalled").exists()


@pytest.mark.parametrize("held", [True, False])
def test_a_short_read_is_told_from_a_clip_that_was_cut_off(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    if not held:  # as large files are read: by the decoders, piece by piece
        monkeypatch.setattr("raysft.data.clips.file._HELD", 0)
    manifest = corpus(tmp_path / "data")
    for path in sorted(manifest.parent.glob("clip*")):
        whole = audio.load(str(path), RATE)
        faults(path.name)
        faults.short = True
        with pytest.raises(OSError, match="ends at byte"):
            audio.load(str(path), RATE)
        faults.short = False
        assert np.array_equal(audio.load(str(path), RATE), whole)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(BadExample, match=r"cut off|damaged|not audio"):
            audio.load(str(path), RATE)


@pytest.mark.parametrize("held", [True, False])
def test_an_error_in_the_middle_of_a_clip_is_never_taken_for_its_content(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """Whichever of its reads fails, in the index or in training, in whichever decoder."""
    if not held:
        monkeypatch.setattr("raysft.data.clips.file._HELD", 0)
    monkeypatch.setattr("raysft.data.clips.flac._WHOLE", 0)  # or they are read as one
    monkeypatch.setattr("raysft.data.clips.ogg._WHOLE", 0)
    for kind in KINDS:
        path = tmp_path / f"clip.{kind}"
        path.write_bytes(encoded(kind))
        _fail_each_read(str(path), monkeypatch)


@pytest.mark.parametrize("held", [True, False])
def test_nor_is_one_where_pyav_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    pytest.importorskip("av")
    if not held:
        monkeypatch.setattr("raysft.data.clips.file._HELD", 0)
    wave = tmp_path / "clip.wav"
    wave.write_bytes(encoded("wav"))
    for suffix, container in (("m4a", "ipod"), ("webm", "webm")):
        path = tmp_path / f"clip.{suffix}"
        if container == "ipod":  # which ffmpeg cannot write to a pipe
            ffmpeg("-i", wave, "-f", container, path)
        else:
            path.write_bytes(ffmpeg("-i", wave, "-f", container, "-"))
        _fail_each_read(str(path), monkeypatch)


def _fail_each_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    count = fails = 0

    def counted(handle: int, size: int, offset: int) -> bytes:
        nonlocal count
        count += 1
        if count == fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(handle, size, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", counted)
        for read in (audio.probe, partial(audio.load, rate=RATE)):
            count = fails = 0
            read(path)
            for place in range(1, count + 1):
                count, fails = 0, place
                with pytest.raises(OSError, match="Input/output"):
                    read(path)


@pytest.mark.parametrize(
    ("call", "number"),
    [("stat", errno.EACCES), ("open", errno.ESTALE), ("pread", errno.EIO)],
)
def test_an_index_waits_for_storage_and_records_no_clip_as_unusable(
    tmp_path: Path, faults: Faults, call: str, number: int
) -> None:
    manifest = corpus(tmp_path / "data")
    faults(".flac", number, **{call: 2})
    assert make_reader(manifest).index.rejected == []
    faults(".ogg", number, stat=2)  # of the clips it knows: which have changed
    assert make_reader(manifest).index.rejected == []
    (tmp_path / "data" / "clip1.flac").touch()  # measured anew
    faults(".flac", number, **{call: 10_000})
    with pytest.raises(UserError, match=r"clip1\.flac: its storage does not give it"):
        make_reader(manifest)


def test_a_clip_that_was_never_there_is_named_and_left_out(tmp_path: Path) -> None:
    manifest = corpus(tmp_path / "data")
    (tmp_path / "data" / "clip3.mp3").unlink()
    (found,) = make_reader(manifest).index.rejected
    assert "no such file" in found.reason


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
def test_data_files_and_index_are_waited_for(tmp_path: Path, faults: Faults, number: int) -> None:
    reader = make_reader(corpus(tmp_path / "data"))
    before = everything(reader)
    folder = reader.index.folder
    for ending in ("meta.json", "tokens.npy", "crc.npy", "rejected.jsonl"):
        faults(ending, number, io=2)
        index = Index.load(folder)
        assert index.rejected == []
        assert faults.left["io"] == 0
    for call in ("open", "pread"):
        reader.index = Index.load(folder)
        faults("train.jsonl", number, **{call: 2})
        assert differences(everything(reader), before) == []
        assert faults.left[call] == 0
    faults("train.jsonl", number, open=10_000, pread=10_000)
    with pytest.raises(UserError, match=r"train\.jsonl: its storage does not give it"):
        everything(reader)


def test_a_short_read_of_records_is_not_taken_for_a_change(tmp_path: Path, faults: Faults) -> None:
    reader = make_reader(corpus(tmp_path / "data"))
    before = everything(reader)
    faults("train.jsonl")
    faults.short = True
    with pytest.raises(UserError, match=r"train\.jsonl: its storage does not give it .* bytes"):
        reader.index.examples(np.arange(len(SUFFIXES)))
    faults.short = False
    assert differences(everything(reader), before) == []
    (tmp_path / "data" / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="has changed since it was indexed"):
        everything(reader)


def test_a_data_file_is_surveyed_again_where_its_storage_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = corpus(tmp_path / "data")
    source = resolve(Source(path=str(manifest)), "train")
    expected, _ = part.survey_file(source, manifest, tmp_path / "one")
    real = json_lines.survey

    def flaky(file: Path) -> Any:
        if times:
            times.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return real(file)

    times = [1, 1]
    monkeypatch.setattr(json_lines, "survey", flaky)
    assert part.survey_file(source, manifest, tmp_path / "two")[0] == expected


@pytest.fixture(autouse=True)
def patience_of_the_process() -> Iterator[None]:
    """`prepare` and tests above set it."""
    yield
    patience.allow(patience.SECONDS)
