"""Clips become mono samples of the length their header promised, or one readable reason."""

import os
import resource

import numpy as np
import pytest
import soundfile

from raysft.config.schema import Data
from raysft.data.clips import audio
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
    samples, own_rate = audio.probe(path)[:2]
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
    assert "a folder, not a file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")  # would wait for ever if it were opened
    assert "a pipe, socket or device, not a file" in refused(tmp_path / "pipe.wav")
    (tmp_path / "empty.wav").touch()
    assert "empty" in refused(tmp_path / "empty.wav")
    (tmp_path / "page.wav").write_bytes(b"<html>not found</html>" * 50)
    assert "not audio" in refused(tmp_path / "page.wav")
    (tmp_path / "clip.raw").write_bytes(bytes(4000))
    assert "no header" in refused(tmp_path / "clip.raw")
    assert "cannot be read" in refused(tmp_path / "a\0b.wav")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    assert "cannot be read" in refused(tmp_path / "loop.wav")
    assert "no such file" in refused(tmp_path / "page.wav" / "clip.wav")
    soundfile.write(tmp_path / "short.wav", tone(16000, 0.02), 16000)
    assert "too short: 320 samples at 16000 Hz" in refused(tmp_path / "short.wav")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_its_storages_fault(tmp_path):
    soundfile.write(tmp_path / "clip.wav", tone(16000), 16000)
    (tmp_path / "clip.wav").chmod(0)
    for read in (audio.probe, load16):
        with pytest.raises(PermissionError):
            read(str(tmp_path / "clip.wav"))


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "opus"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_clips_that_were_cut_off_are_refused(tmp_path, suffix, share):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).normal(0, 0.1, 32000)
    opus = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    soundfile.write(whole, noise, 16000, **opus)
    assert len(load16(str(whole))) == 32000
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    assert "cut off" in refused(cut, load16)


@pytest.mark.parametrize("cut", [*range(1, 40), 300, 4000])
def test_an_ogg_is_whole_only_with_its_last_page(tmp_path, cut):
    whole = tmp_path / "whole.ogg"
    soundfile.write(whole, np.random.default_rng(0).normal(0, 0.1, 32000), 16000)
    data = whole.read_bytes()
    (tmp_path / "cut.ogg").write_bytes(data[:-cut])
    assert "cut off" in refused(tmp_path / "cut.ogg")
    whole.write_bytes(data + b"TAG, as some programs append one")
    audio.probe(str(whole))


def test_a_wav_streamed_without_its_length_is_read(tmp_path):
    path = tmp_path / "streamed.wav"
    soundfile.write(path, tone(16000), 16000)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"  # as programs write that stream to a pipe
    path.write_bytes(data)
    assert audio.probe(str(path))[:2] == (8000, 16000)
    assert len(load16(str(path))) == 8000


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, wrong):
    wave = tone(16000)
    wave[100] = wrong
    soundfile.write(tmp_path / "clip.wav", wave, 16000, subtype="FLOAT")
    assert "NaN or infinite" in refused(tmp_path / "clip.wav", load16)


def test_clips_shorter_or_longer_than_wanted_are_refused_by_header_and_decoded(tmp_path):
    path = str(tmp_path / "clip.wav")
    soundfile.write(path, tone(16000, 0.5), 16000)
    assert Data().min_seconds == audio.SHORTEST_S  # one frame: what every front end can take
    for by in (audio.probe, load16):
        assert "too short: 8000 samples" in refused(path, with_limits(by, min_seconds=0.6))
        assert "too long: 0.50 s, more than data.max_seconds=0.4" in refused(
            path, with_limits(by, max_seconds=0.4)
        )
        with_limits(by, min_seconds=0.5, max_seconds=0.5)(path)


def with_limits(by, **limits):
    def read(path):
        if by is audio.probe:
            return audio.probe(path, audio.Limits(**limits))
        return audio.load(path, 16000, audio.Limits(**limits))

    return read


@pytest.mark.parametrize("wave", [np.zeros(8000), 1e-5 * np.ones(8000), -1e-5 * np.ones(8000)])
def test_silence_is_refused_unless_it_is_wanted(tmp_path, wave):
    path = str(tmp_path / "clip.wav")
    soundfile.write(path, wave, 16000, subtype="FLOAT")
    wanted = audio.Limits.of(Data(silence_db=None))
    assert len(audio.load(path, 16000, wanted)) == 8000
    reason = refused(path, lambda path: audio.load(path, 16000, audio.Limits.of(Data())))
    assert "silent: " in reason
    assert "data.silence_db=null" in reason


def test_by_default_two_steps_of_16_bits_are_no_silence(tmp_path):
    path = str(tmp_path / "clip.wav")
    limits = audio.Limits.of(Data())
    soundfile.write(path, np.tile([1, -1, 0], 3000).astype(np.int16), 16000)  # dithered silence
    assert "silent: its peak is -90.3 dBFS" in refused(path, lambda p: audio.load(p, 16000, limits))
    soundfile.write(path, np.tile([0, -2], 4000).astype(np.int16), 16000)
    assert np.abs(audio.load(path, 16000, limits)).max() == 2 / 32768


def test_what_a_header_promises_takes_no_memory(tmp_path):
    path = tmp_path / "clip.flac"
    soundfile.write(path, tone(16000), 16000)
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # the length in a flac's header: 36 bits, of which these are the highest
    path.write_bytes(data)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for by in (audio.probe, load16):
        assert "cut off: 8000 of 64424517440 samples" in refused(path, by)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 50_000  # kB


def test_a_clip_longer_than_expected_is_refused_undecoded(tmp_path):
    path = tmp_path / "clip.flac"
    soundfile.write(path, np.zeros(16000 * 600), 16000)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reason = refused(path, lambda path: audio.load(path, 16000, most_seconds=2.0))
    assert "longer than indexed: 600.00 s" in reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 10_000  # kB


@pytest.mark.parametrize("rate", [1, 7, 1000, 655350])
def test_odd_rates_are_read_or_refused(tmp_path, rate):
    path = str(tmp_path / "clip.wav")
    soundfile.write(path, tone(16000, 1.5 * rate / 16000 + 0.01), rate)
    samples = audio.probe(path).samples
    assert len(audio.load(path, 16000)) == audio.resampled_length(samples, rate, 16000)
