"""What an index makes of clips that were replaced, that are missing, or of too many unusable."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest

from raysft.data.clips import states
from raysft.data.clips.audio import Limits
from raysft.data.index import hope
from raysft.errors import UserError
from tests.support.indexes import (
    aged,
    asr,
    build,
    clip,
    contents,
    jsonl,
)


def test_clips_replaced_in_place_are_measured_again_and_no_others(tmp_path, probes, caplog):
    clips = [clip(tmp_path / f"{i}.wav", 0.5) for i in range(6)]
    file = jsonl(tmp_path / "t.jsonl", [asr(f"{i}.wav", id=str(i)) for i in range(6)])
    first = build(tmp_path / "i", file)
    probes.clear()
    assert build(tmp_path / "i", file).hash == first.hash
    assert probes == []
    clip(clips[2], 0.9)
    clips[4].unlink()
    aged(clips[3], seconds=50)  # touched, or copied: looked at, and found to be as it was
    second = build(tmp_path / "i", file)
    assert sorted(probes) == ["2.wav", "3.wav", "4.wav"]
    assert "clips of 3 examples were replaced" in caplog.text
    assert second.ids(np.arange(5)) == ["0", "1", "2", "3", "5"]
    assert second.seconds.tolist() == pytest.approx([0.5, 0.5, 0.9, 0.5, 0.5])
    assert [item.id for item in second.rejected] == ["4"]
    shutil.rmtree(tmp_path / "i")
    assert contents(build(tmp_path / "i", file)) == contents(second)


def test_a_clip_written_just_now_is_looked_at_once_more(tmp_path, probes):
    made = clip(tmp_path / "a.wav")
    os.utime(made)
    file = jsonl(tmp_path / "t.jsonl", [asr()])
    build(tmp_path / "i", file)
    before = made.stat()
    clip(tmp_path / "a.wav", 0.25, 32000)  # as many bytes, within the clock's grain
    os.utime(made, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert made.stat().st_size == before.st_size
    assert build(tmp_path / "i", file).seconds[0] == 0.25
    aged(made)
    build(tmp_path / "i", file)
    probes.clear()
    build(tmp_path / "i", file)
    assert probes == []


def test_an_example_of_many_clips_or_a_clip_of_many_examples_is_measured_again(tmp_path, probes):
    clips = [clip(tmp_path / f"{i}.wav", 0.5) for i in range(2)]
    records = [asr(f"{i % 2}.wav", "x" * (i + 1), id=str(i)) for i in range(40)]
    file = jsonl(tmp_path / "t.jsonl", records)
    build(tmp_path / "i", file)
    clip(clips[1], 0.7)
    probes.clear()
    second = build(tmp_path / "i", file)
    assert probes == ["1.wav"]
    assert second.seconds.tolist() == pytest.approx([0.5, 0.7] * 20)
    assert second.ids(np.arange(40)) == [str(i) for i in range(40)]


def test_a_wrong_root_is_said_after_a_few_thousand_clips(tmp_path, probes):
    clip(tmp_path / "there.wav")
    records = [asr(f"moved/clips/{i:06}.wav") for i in range(60_000)]
    file = jsonl(tmp_path / "train.jsonl", [*records, asr("there.wav")])
    with pytest.raises(UserError) as caught:
        build(tmp_path / "i", file, most=0.05, workers=1)
    line = str(caught.value)
    assert line.startswith("data.train[0]: none of the first ")
    assert f"{tmp_path}/moved/clips/000000.wav (there is no folder {tmp_path}/moved)" in line
    assert f"begin at the folder of their file, {tmp_path}" in line
    assert "\n" not in line
    assert len(line) < 700
    assert 4096 <= len(probes) < 20_000
    assert sum(path.stat().st_size for path in (tmp_path / "i").rglob("*") if path.is_file()) < 9000


def test_a_missing_stretch_of_a_corpus_is_no_wrong_root(tmp_path):
    clip(tmp_path / "there.wav")
    records = [asr(f"moved/{i}.wav") for i in range(5000)]
    file = jsonl(tmp_path / "train.jsonl", [asr("there.wav"), *records])
    assert len(build(tmp_path / "i", file, most=0.05, workers=1).rejected) == 5000


def test_far_too_many_unusable_examples_end_it_before_all_their_reasons_are_held(
    tmp_path, small_chunks, monkeypatch
):
    monkeypatch.setattr(hope, "MANY", 50)
    clip(tmp_path / "there.wav")
    names = ["there.wav" if i % 4 else "gone.wav" for i in range(2000)]
    file = jsonl(tmp_path / "train.jsonl", map(asr, names))
    with pytest.raises(UserError, match=r"of the first 2\d\d examples of data.train 5\d are"):
        build(tmp_path / "i", file, most=0.05, workers=1)
    assert len(build(tmp_path / "i", file, most=0.2, workers=1).rejected) == 500


def threads_of(function, count, **limits):
    """Threads that calls of `function` run in, and how long all of them take."""
    threads = Counter()

    def call(path):
        threads[threading.get_ident()] += 1
        return function(path)

    began = time.perf_counter()
    names = [f"{i}.wav" for i in range(count)]
    assert list(states.at_once(call, names, Limits(**limits)).values()) == names
    return threads, time.perf_counter() - began


def test_clips_that_are_there_at_once_are_looked_at_by_one_thread(tmp_path):
    threads, _ = threads_of(lambda path: path, 2000)
    assert len(threads) == 1


def test_clips_that_come_late_are_waited_for_together(tmp_path):
    def late(path):
        time.sleep(0.01)
        return path

    threads, took = threads_of(late, 400)
    assert len(threads) >= states.THREADS
    assert took < 400 * 0.01 / 3


def test_work_is_no_waiting(tmp_path):
    def busy(path):
        return path if sum(range(50_000)) else ""

    threads, _ = threads_of(busy, 200)
    assert len(threads) == 1


def test_a_storage_that_is_gone_is_noticed_by_several_at_once(tmp_path):
    gone = threading.Event()
    began = time.perf_counter()
    with pytest.raises(UserError, match="no answer within"):
        names = [f"{i}.wav" for i in range(1000)]
        states.at_once(lambda path: gone.wait(30), names, Limits(read_timeout_s=0.4))
    assert time.perf_counter() - began < 9  # 32 clips, one after the other: 13 s
    gone.set()
