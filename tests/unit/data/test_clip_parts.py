"""Parts of a file, single channels and clips that records carry: the same sound as in the whole."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft.data.clips import audio
from raysft.data.clips.audio import Limits, Shared, load, probe
from raysft.data.example import Audio
from raysft.errors import BadExample
from tests.support.audio_files import KINDS, encoded, speech

PARTS = [(0.0, 0.5), (0.25, 0.75), (0.1234567, 1.0), (0.5, None), (0.0, None)]
RECORD = "shard.tar/a"


def written(tmp_path: Path, kind: str, data: bytes) -> str:
    path = tmp_path / f"clip.{kind}"
    path.write_bytes(data)
    return str(path)


def samples_of(start: float, stop: float | None, rate: int, count: int) -> slice:
    return slice(round(start * rate), count if stop is None else min(round(stop * rate), count))


@pytest.mark.parametrize("carried", [False, True], ids=["file", "bytes"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_has_the_samples_of_the_whole_and_is_as_long_as_measured(
    tmp_path: Path, kind: str, carried: bool
) -> None:
    rate, data = KINDS[kind][0], encoded(kind)
    whole = load(written(tmp_path, kind, data), rate)
    path, content = (RECORD, data) if carried else (str(tmp_path / f"clip.{kind}"), None)
    shared = Shared()
    for start, stop in PARTS:
        clip = Audio(path, start=start, stop=stop, bytes=content)
        expected = whole[samples_of(start, stop, rate, len(whole))]
        assert probe(clip)[:2] == (len(expected), rate)
        np.testing.assert_array_equal(load(clip, rate), expected)
        np.testing.assert_array_equal(load(clip, rate, shared=shared), expected)
        resampled = load(clip, 11025)
        assert len(resampled) == audio.resampled_length(len(expected), rate, 11025)
        np.testing.assert_array_equal(resampled, audio.resample(expected, rate, 11025))


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_parts_and_channels_are_those_that_soundfile_reads(tmp_path: Path, kind: str) -> None:
    rate = 22050
    wave = np.stack([speech(rate, 8.0, seed) for seed in (1, 2)], axis=1)
    path = str(tmp_path / f"clip.{kind}")
    soundfile.write(path, wave, rate)
    theirs, _ = soundfile.read(path, dtype="float32", always_2d=True)
    assert probe(path).channels == 2
    for start, stop in [(0.0, None), (1.5, 2.0), (7.0, 8.0)]:
        cut = theirs[samples_of(start, stop, rate, len(theirs))]
        for channel in (0, 1):
            clip = Audio(path, start=start, stop=stop, channel=channel)
            assert probe(clip).samples == len(cut)
            np.testing.assert_allclose(load(clip, rate), cut[:, channel], atol=1e-6)
        mixed = load(Audio(path, start=start, stop=stop), rate)
        np.testing.assert_allclose(mixed, cut.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("kind", ["mp3", "flac", "ogg"])
def test_a_part_of_files_that_were_joined_is_that_of_their_decode(
    tmp_path: Path, kind: str
) -> None:
    rate = KINDS[kind][0]
    path = written(tmp_path, kind, encoded(kind, 1) + encoded(kind, 2))
    whole = load(path, rate)
    middle = len(whole) / rate / 2
    clip = Audio(path, start=middle - 0.2, stop=middle + 0.2)
    expected = whole[samples_of(middle - 0.2, middle + 0.2, rate, len(whole))]
    assert probe(clip).samples == len(expected)
    np.testing.assert_array_equal(load(clip, rate), expected)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "opus", "mp3"])
def test_a_clip_that_a_record_carries_is_that_of_the_file(tmp_path: Path, kind: str) -> None:
    data = encoded(kind, channels=2)
    path = written(tmp_path, kind, data)
    clip = Audio(RECORD, bytes=data)
    np.testing.assert_array_equal(load(clip, 16000), load(path, 16000))
    found = probe(clip)
    assert found[:2] == probe(path)[:2]
    assert (found.size, found.mtime_ns) == (len(data), 0)
    with pytest.raises(BadExample, match=rf"^{RECORD}: empty file"):
        probe(Audio(RECORD, bytes=b""))
    with pytest.raises(BadExample, match=rf"^{RECORD}: (cut off|not audio|damaged)"):
        load(Audio(RECORD, bytes=data[: len(data) // 2]), 16000)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_the_sample_of_a_number_is_named_by_its_time(tmp_path: Path, rate: int) -> None:
    wave = np.arange(3 * rate, dtype=np.float32) / (3 * rate)
    path = str(tmp_path / "clip.wav")
    soundfile.write(path, wave, rate, subtype="FLOAT")
    for first in np.random.default_rng(0).integers(0, 2 * rate, 50).tolist():
        last = first + rate
        clip = load(Audio(path, start=first / rate, stop=last / rate), rate)
        np.testing.assert_array_equal(clip, wave[first:last])


@pytest.mark.parametrize(
    ("start", "stop", "channel", "said"),
    [
        (-1.0, 2.0, None, "from -1 to 2 s is no part of a clip"),
        (2.0, 2.0, None, "from 2 to 2 s is no part of a clip"),
        (float("nan"), None, None, "is no part of a clip"),
        (4.0, None, None, "has 3.00 s, of which 4 s to its end is no part"),
        (1.0, 3.2, None, "has 3.00 s, of which 1 s to 3.2 s is no part"),
        (1.0, 1.01, None, "too short: 160 samples"),
        (0.0, None, 2, "has no channel 2: it has 2, counted from 0"),
        (0.0, 1.0, -1, "has no channel -1"),
    ],
)
@pytest.mark.parametrize("kind", ["wav", "ogg"])
def test_what_is_no_part_of_its_file_is_refused_by_both(
    tmp_path: Path, kind: str, start: float, stop: float | None, channel: int | None, said: str
) -> None:
    path = str(tmp_path / f"clip.{kind}")
    soundfile.write(path, np.stack([speech(16000, 3.0)] * 2, axis=1), 16000)
    clip = Audio(path, start=start, stop=stop, channel=channel)
    for by in (probe, lambda clip: load(clip, 16000)):
        with pytest.raises(BadExample) as raised:
            by(clip)
        assert str(raised.value).startswith(f"{path}: ")
        assert said in str(raised.value)


def test_a_part_may_end_a_little_behind_its_file_and_ends_with_it(tmp_path: Path) -> None:
    path = str(tmp_path / "clip.wav")
    soundfile.write(path, speech(16000, 3.0), 16000)
    clip = Audio(path, start=1.0, stop=3.05)
    assert probe(clip).samples == len(load(clip, 16000)) == 32000


def test_limits_are_of_the_part_and_not_of_its_file(tmp_path: Path) -> None:
    path = str(tmp_path / "clip.flac")
    soundfile.write(path, np.concatenate([speech(16000, 3.0), np.zeros(16000)]), 16000)
    limits = Limits(max_seconds=1.5, silence_db=-60)
    assert len(load(Audio(path, start=1.0, stop=2.0), 16000, limits)) == 16000
    assert probe(Audio(path, start=1.0, stop=2.0), limits).samples == 16000
    for by in (probe, lambda clip, limits: load(clip, 16000, limits)):
        with pytest.raises(BadExample, match=r"too long: 2\.00 s"):
            by(Audio(path, start=0.5, stop=2.5), limits)
    with pytest.raises(BadExample, match="silent"):
        load(Audio(path, start=3.1), 16000, limits)
    with pytest.raises(BadExample, match=r"longer than indexed: 2\.00 s, expected at most 1\.00"):
        load(Audio(path, start=2.0), 16000, most_seconds=1.0)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_part_of_a_long_file_costs_what_it_is_long(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / f"clip.{kind}")
    soundfile.write(path, 0.1 * speech(16000, 120.0), 16000)
    read = 0
    real = os.pread

    def counted(handle: int, count: int, offset: int) -> bytes:
        nonlocal read
        data = real(handle, count, offset)
        read += len(data)
        return data

    monkeypatch.setattr(os, "pread", counted)
    assert len(load(Audio(path, start=100.0, stop=101.0), 16000)) == 16000
    assert read < os.stat(path).st_size / 10


def test_parts_of_one_file_share_its_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "clip.ogg")
    soundfile.write(path, speech(16000, 60.0), 16000)
    decoded: list[int] = []
    real = audio._decoded

    def counted(*args):
        pieces = real(*args)
        decoded.append(sum(len(samples) for samples, _ in pieces))
        return pieces

    monkeypatch.setattr(audio, "_decoded", counted)
    shared = Shared()
    for second in range(60):
        load(Audio(path, start=float(second), stop=second + 1.0), 16000, shared=shared)
    assert sum(decoded) <= 3 * 60 * 16000
    held = len(decoded)
    os.utime(path)  # another file by now
    load(Audio(path, start=0.0, stop=1.0), 16000, shared=shared)
    assert len(decoded) == held + 1
    shared.clear()
    load(Audio(path, start=0.0, stop=1.0), 16000, shared=shared)
    assert len(decoded) == held + 2


def test_what_is_handed_out_is_nobody_elses(tmp_path: Path) -> None:
    path = str(tmp_path / "clip.ogg")
    soundfile.write(path, speech(16000, 3.0), 16000)
    shared = Shared()
    clip = Audio(path, start=1.0, stop=2.0)
    first = load(clip, 16000, shared=shared)
    before = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(load(clip, 16000, shared=shared), before)


def test_an_audio_without_more_is_the_file_by_its_path(tmp_path: Path) -> None:
    path = written(tmp_path, "wav", encoded("wav"))
    assert not Audio(path).part
    assert Audio(path, 1.3).sound == Audio(path).file == Audio(path)
    assert probe(Audio(path)) == probe(path)
    np.testing.assert_array_equal(load(Audio(path), 16000), load(path, 16000))
    assert "bytes" not in repr(Audio(path, bytes=io.BytesIO(b"x").getvalue()))
