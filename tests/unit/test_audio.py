"""Clips become mono samples of the length their header promised, or one readable reason."""

import os

import numpy as np
import pytest
import soundfile

from raysft.data import audio
from raysft.errors import BadExample


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0, channels: int = 1) -> np.ndarray:
    wave = 0.4 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    return np.stack([wave * (1 - c) for c in range(channels)], axis=1) if channels > 1 else wave


@pytest.mark.parametrize(
    ("suffix", "rate"),
    [(s, r) for s in ("wav", "flac", "ogg") for r in (8000, 22050, 44100, 96000)]
    + [("mp3", r) for r in (8000, 22050, 44100)],  # mp3 ends at 48 kHz
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_rate_and_channel_count_becomes_mono_of_the_promised_length(
    tmp_path, suffix, rate, channels
):
    path = str(tmp_path / f"clip.{suffix}")
    soundfile.write(path, tone(rate, channels=channels), rate)
    samples, own_rate = audio.probe(path)
    clip = audio.load(path, 16000)
    assert own_rate == rate
    assert clip.dtype == np.float32
    assert clip.shape == (audio.resampled_length(samples, rate, 16000),)
    # The second channel is silent: the mix has half the amplitude, at the same pitch.
    middle = clip[2000:6000] * np.hanning(4000)
    spectrum = np.abs(np.fft.rfft(middle))
    assert np.argmax(spectrum) * 16000 / 4000 == 440
    assert spectrum.max() / 1000 == pytest.approx(0.4 / channels, rel=0.05)


def test_opus_is_read(tmp_path):
    path = str(tmp_path / "clip.ogg")
    soundfile.write(path, tone(48000), 48000, format="OGG", subtype="OPUS")
    assert len(audio.load(path, 16000)) == 8000


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 96000])
def test_resampling_gives_exactly_the_length_that_was_measured(rate):
    for samples in (*range(400, 1400, 7), 44101, 99999):
        clip = audio.resample(np.zeros(samples, np.float32), rate, 16000)
        assert len(clip) == audio.resampled_length(samples, rate, 16000)


def test_resampling_agrees_with_another_band_limited_resampler():
    from scipy.signal import resample_poly

    clip = tone(44100, 1.0, 1000).astype(np.float32)
    ours = audio.resample(clip, 44100, 16000)
    theirs = resample_poly(clip, 160, 441)
    assert np.abs(ours - theirs)[500:-500].max() < 2e-3


def test_samples_at_the_wanted_rate_stay_as_they_are(tmp_path):
    path = str(tmp_path / "clip.wav")
    wave = tone(16000).astype(np.float32)
    soundfile.write(path, wave, 16000, subtype="FLOAT")
    assert np.array_equal(audio.load(path, 16000), wave)


def refused(path, by=audio.probe) -> str:
    with pytest.raises(BadExample) as caught:
        by(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


def load16(path: str) -> np.ndarray:
    return audio.load(path, 16000)


def test_unusable_files_are_refused_with_their_reason(tmp_path):
    assert "no such file" in refused(tmp_path / "none.wav")
    assert "not a regular file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")  # would wait for ever if it were opened
    assert "not a regular file" in refused(tmp_path / "pipe.wav")
    (tmp_path / "empty.wav").touch()
    assert "empty" in refused(tmp_path / "empty.wav")
    (tmp_path / "page.wav").write_bytes(b"<html>not found</html>" * 50)
    assert "not audio" in refused(tmp_path / "page.wav")
    (tmp_path / "clip.raw").write_bytes(bytes(4000))
    assert "no header" in refused(tmp_path / "clip.raw")
    assert "cannot be read" in refused(tmp_path / "a\0b.wav")
    soundfile.write(tmp_path / "short.wav", tone(16000, 0.02), 16000)
    assert "shorter than one frame" in refused(tmp_path / "short.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_clips_that_were_cut_off_are_refused(tmp_path, suffix):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).normal(0, 0.1, 32000)
    soundfile.write(whole, noise, 16000)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "cut off" in refused(cut, load16)


def test_a_wav_streamed_without_its_length_is_read(tmp_path):
    path = tmp_path / "streamed.wav"
    soundfile.write(path, tone(16000), 16000)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"  # as programs write that stream to a pipe
    path.write_bytes(data)
    assert audio.probe(str(path)) == (8000, 16000)
    assert len(load16(str(path))) == 8000


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, wrong):
    wave = tone(16000)
    wave[100] = wrong
    soundfile.write(tmp_path / "clip.wav", wave, 16000, subtype="FLOAT")
    assert "NaN or infinite" in refused(tmp_path / "clip.wav", load16)
