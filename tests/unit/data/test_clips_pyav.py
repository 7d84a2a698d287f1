"""Clips of the formats that PyAV reads: to their end, or refused for what is wrong with them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft.data.clips import audio
from raysft.data.quarantine import kind as kind_of
from tests.support.audio_files import ffmpeg, ffmpeg_samples, speech
from tests.unit.data.test_clips import FLOW, RATE, load, put, refused, seconds

FOREIGN = {
    "m4a": ["-c:a", "aac"],
    "aac": ["-c:a", "aac"],
    "mp4": ["-c:a", "aac", "-ac", "2"],
    "webm": ["-c:a", "libopus"],
    "mka": ["-c:a", "flac"],
    "oga": ["-c:a", "flac"],
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("foreign")
    soundfile.write(folder / "base.wav", speech(48000, 3.0), 48000)
    for suffix, options in FOREIGN.items():
        ffmpeg("-i", folder / "base.wav", *options, folder / f"clip.{suffix}")
    return {suffix: folder / f"clip.{suffix}" for suffix in FOREIGN}


@pytest.mark.parametrize("suffix", FOREIGN)
def test_what_libsndfile_does_not_know_is_read_by_pyav(foreign, suffix):
    pytest.importorskip("av")
    path = str(foreign[suffix])
    assert seconds(path) == pytest.approx(ffmpeg_samples(path, RATE) / RATE, rel=FLOW)
    wanted = speech(RATE, 3.0)[4000:20000]
    windows = np.lib.stride_tricks.sliding_window_view(load(path)[:24000], len(wanted))
    likeness = windows @ wanted / np.linalg.norm(windows, axis=1) / np.linalg.norm(wanted)
    assert likeness.max() > 0.95


@pytest.mark.parametrize("suffix", FOREIGN)
def test_without_pyav_its_extra_is_named(foreign, suffix, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    reason = refused(str(foreign[suffix]))
    assert "pip install 'raysft[av]'" in reason
    assert kind_of(reason) == "not audio"


def test_a_broken_file_for_pyav_is_refused(foreign, tmp_path):
    pytest.importorskip("av")
    data = foreign["m4a"].read_bytes()
    assert kind_of(refused(put(tmp_path, data[: len(data) // 2]))) in ("not audio", "truncated")
    assert refused(put(tmp_path, data[:40], "head.m4a"))
    video = tmp_path / "silent.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x64:duration=1", "-c:v", "mpeg4", video)
    assert "it holds no sound" in refused(str(video))


@pytest.mark.parametrize("suffix", ["m4a", "faststart.m4a", "webm", "mka", "oga", "mkv"])
def test_what_pyav_reads_is_called_cut_off_where_it_is(foreign, tmp_path, suffix):
    pytest.importorskip("av")
    path = tmp_path / f"clip.{suffix}"
    if suffix == "faststart.m4a":  # the length in front of the sound
        ffmpeg("-i", foreign["m4a"], "-c", "copy", "-movflags", "+faststart", path)
    elif suffix == "mkv":  # pictures that go on for longer
        pictures = ["-f", "lavfi", "-i", "testsrc=size=64x64:duration=5"]
        ffmpeg("-i", foreign["mka"], *pictures, "-c:v", "mpeg4", "-c:a", "flac", path)
    else:
        path = foreign[suffix]
    assert seconds(str(path)) == pytest.approx(3.0, abs=0.03)
    data = path.read_bytes()
    for share in (0.5, 0.85):
        cut = put(tmp_path, data[: int(len(data) * share)], f"cut.{suffix}")
        kinds = {kind_of(refused(cut, by)) for by in (audio.probe, load)}
        assert kinds <= ({"truncated", "not audio"} if suffix == "m4a" else {"truncated"})


def test_gaps_that_a_file_has_are_no_end_of_it(foreign, tmp_path):
    pytest.importorskip("av")
    path = tmp_path / "gap.mka"
    gap = "aselect='lt(t,1)+gt(t,2)'"  # the time stamps stay
    ffmpeg("-i", foreign["mka"], "-af", gap, "-c:a", "flac", "-frame_size", "1024", path)
    assert 1.9 < len(load(str(path))) / RATE < 2.2


def test_joined_files_of_which_pyav_would_read_the_first_are_refused(foreign, tmp_path):
    pytest.importorskip("av")
    for suffix in ("m4a", "mp4"):
        for by in (audio.probe, load):
            reason = refused(put(tmp_path, foreign[suffix].read_bytes() * 2), by)
            assert "several MP4 files were joined end to end" in reason
            assert kind_of(reason) == "not audio"
    for suffix in ("webm", "mka", "oga", "aac"):
        joined = put(tmp_path, foreign[suffix].read_bytes() * 2, f"joined.{suffix}")
        assert seconds(joined) == pytest.approx(6.0, abs=0.1)
