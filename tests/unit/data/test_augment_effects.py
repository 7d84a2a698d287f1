"""What is done to a clip is what others do who are asked for the same: lhotse, torchaudio, audioop;
or what the definition says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from lhotse import Recording
from lhotse.augmentation import ReverbWithImpulseResponse, Speed, Volume

from raysft.config.augment import KnownCodec, Spec
from raysft.data.clips import effects
from raysft.data.clips.stripes import Spectrogram

RATE = 16000


def speech_like(seconds: float = 2.0, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Harmonics that glide and swell, and a little noise: float32, below 1."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = 2 * np.pi * np.cumsum(130 + 30 * np.sin(2 * np.pi * 0.7 * time)) / rate
    wave = sum(np.sin(n * pitch) / n for n in range(1, 12))
    wave *= 0.2 * (1.1 + np.sin(2 * np.pi * 2.3 * time))
    return (wave + 0.003 * rng.standard_normal(len(time))).astype(np.float32)


def db(left: np.ndarray, right: np.ndarray) -> float:
    """Power of `left` over that of its difference to `right`."""
    error = float(np.mean((left - right).astype(np.float64) ** 2))
    return 10 * np.log10(float(np.mean(left.astype(np.float64) ** 2)) / max(error, 1e-30))


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.25])
def test_speed_is_that_of_lhotse(factor: float) -> None:
    clip = speech_like()
    ours = effects.at_speed(clip, factor)
    theirs = Speed(factor)(clip[None], RATE)[0]
    assert ours.dtype == np.float32 and len(ours) == effects.length_at(len(clip), factor)
    assert abs(len(ours) - len(theirs)) <= 1
    inner = slice(400, min(len(ours), len(theirs)) - 400)  # another filter at the ends
    assert db(theirs[inner], ours[inner]) > 40


def test_speed_moves_tempo_and_pitch() -> None:
    time = np.arange(2 * RATE) / RATE
    found = effects.at_speed(np.sin(2 * np.pi * 500 * time).astype(np.float32), 1.25)
    assert len(found) == 1.6 * RATE
    assert np.abs(np.fft.rfft(found)).argmax() / 1.6 == pytest.approx(625)


@pytest.mark.parametrize("samples", [400, 401, 16000, 31337])
@pytest.mark.parametrize("factor", [0.5, 0.9, 1 / 3 + 0.5, 1.1, 2.0])
def test_a_length_is_known_beforehand(samples: int, factor: float) -> None:
    clip = np.random.default_rng(samples).uniform(-0.5, 0.5, samples).astype(np.float32)
    assert len(effects.at_speed(clip, factor)) == effects.length_at(samples, factor)


def test_volume_is_that_of_lhotse() -> None:
    clip = 0.3 * speech_like()
    theirs = Volume(factor=10 ** (-5 / 20))(clip[None], RATE)[0]
    np.testing.assert_allclose(effects.louder(clip, -5), theirs, rtol=1e-6)


@pytest.mark.parametrize("snr_db", [-3.0, 0.0, 12.5, 40.0])
def test_noise_has_the_ratio_that_was_asked_for(snr_db: float) -> None:
    clip = speech_like()
    noise = np.random.default_rng(1).standard_normal(len(clip)).astype(np.float32)
    mixed = effects.with_noise(clip, noise, snr_db)
    assert db(clip, mixed) == pytest.approx(snr_db, abs=1e-3)
    added = mixed - clip
    assert np.corrcoef(added, noise)[0, 1] > 0.999
    assert mixed.dtype == np.float32


def test_silence_has_no_ratio_and_stays_as_it_is() -> None:
    clip, silence = speech_like(), np.zeros(2 * RATE, np.float32)
    assert effects.with_noise(clip, silence, 10) is clip
    assert not effects.with_noise(silence, clip, 10).any()
    assert effects.together([silence, silence]).any() == False  # noqa: E712 - an array's


def test_voices_have_one_power() -> None:
    one, other = speech_like(seed=1), 0.01 * speech_like(seed=2)[::-1]
    both = effects.together([one, other])
    for voice in (one, other):
        scaled = voice / np.sqrt(effects.power(voice))
        rest = both - scaled
        assert effects.power(rest) == pytest.approx(1, rel=1e-3)


def test_noise_that_is_short_is_repeated_from_any_place() -> None:
    noise = np.arange(5, dtype=np.float32)
    assert effects.repeated(noise, 3, 12).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def response(delay: int = 37) -> np.ndarray:
    rng = np.random.default_rng(3)
    echo = rng.standard_normal(4000) * np.exp(-np.arange(4000) / 700) * 0.1
    return np.concatenate([np.zeros(delay), [1.0], echo]).astype(np.float32)


def test_a_room_is_that_of_lhotse(tmp_path: Path) -> None:
    clip, room = speech_like(), response()
    soundfile.write(tmp_path / "room.wav", room / 4, RATE, "FLOAT")
    recording = Recording.from_file(tmp_path / "room.wav")
    theirs = ReverbWithImpulseResponse(rir=recording, RIR_SCALING_FACTOR=1.0)(clip[None], RATE)[0]
    ours = effects.in_room(clip, room / 4)
    assert len(ours) == len(clip) and ours.dtype == np.float32
    assert db(theirs, ours) > 60


def test_a_room_neither_delays_nor_turns_up() -> None:
    clip = speech_like()
    heard = effects.in_room(clip, response(delay=500))
    whole = torchaudio.functional.fftconvolve(
        torch.from_numpy(clip), torch.from_numpy(response(delay=500))
    ).numpy()
    part = whole[500 : 500 + len(clip)]
    assert effects.power(heard) == pytest.approx(effects.power(clip), rel=1e-4)
    assert np.corrcoef(heard, part)[0, 1] == pytest.approx(1, abs=1e-6)
    only = effects.in_room(clip, np.array([0, 0, 0.5, 0], np.float32))
    np.testing.assert_allclose(only, clip, atol=1e-5)


@pytest.mark.parametrize("rt60", [0.2, 0.7])
def test_a_room_of_noise_decays_as_asked(rt60: float) -> None:
    found = effects.room(np.random.default_rng(0), RATE, rt60, direct_db=6)
    direct, echo = found[0] ** 2, found[1:].astype(np.float64) ** 2
    assert 10 * np.log10(direct / echo.sum()) == pytest.approx(6, abs=1e-3)
    # Schroeder: the energy still to come, from 5 to 25 dB below all of it
    left = 10 * np.log10(np.cumsum(echo[::-1])[::-1] / echo.sum())
    first, last = np.argmax(left < -5), np.argmax(left < -25)
    assert 60 * (last - first) / RATE / 20 == pytest.approx(rt60, rel=0.1)


def gain(hertz: float, low: float | None, high: float, rate: int = RATE) -> float:
    """dB of a tone in the middle of a clip, and that it is not delayed where it passes."""
    tone = np.sin(2 * np.pi * hertz * np.arange(2 * rate) / rate).astype(np.float32)
    found = effects.in_band(tone, rate, low, high)
    assert len(found) == len(tone) and found.dtype == np.float32
    inner = slice(rate // 2, -rate // 2)
    level = 10 * np.log10(effects.power(found[inner]) / effects.power(tone[inner]))
    if level > -1:
        assert db(tone[inner], found[inner]) > 15
    return level


def test_a_band_lets_through_what_is_in_it() -> None:
    assert abs(gain(1000, 300, 3400)) < 0.1
    assert gain(3400, 300, 3400) == pytest.approx(-6, abs=0.3)
    assert gain(300, 300, 3400) == pytest.approx(-6, abs=0.3)
    assert gain(6800, 300, 3400) < -45 and gain(100, 300, 3400) < -45
    assert abs(gain(100, None, 3400)) < 0.1 and gain(6800, None, 3400) < -45


def test_a_band_wider_than_the_rate_is_no_filter() -> None:
    clip = speech_like(rate=8000)
    assert effects.in_band(clip, 8000, None, 4000.0) is clip
    assert abs(gain(1000, 300, 5000, rate=8000)) < 0.1 and gain(100, 300, 5000, rate=8000) < -45


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
@pytest.mark.parametrize("kind", get_args(KnownCodec))
def test_a_codec_gives_the_clip_back_worse_and_in_its_place(kind: str, rate: int) -> None:
    clip = speech_like(1.0, rate)
    found = effects.coded(clip, rate, kind, 0.6)
    assert found.shape == clip.shape and found.dtype == np.float32
    assert np.array_equal(found, effects.coded(clip, rate, kind, 0.6))
    spectrum = np.fft.rfft(clip, 2 * len(clip)).conj() * np.fft.rfft(found, 2 * len(clip))
    lag = int(np.fft.irfft(spectrum).argmax())
    assert min(lag, 2 * len(clip) - lag) <= 1 + rate // 8000
    assert 0 < db(clip, found) < 60


def test_mulaw_is_that_of_g711() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import audioop  # gone in Python 3.13
    clip = speech_like(1.0, 8000)
    samples = np.round(clip * 32767).astype("<i2")
    theirs = audioop.ulaw2lin(audioop.lin2ulaw(samples.tobytes(), 2), 2)
    ours = effects.coded(clip, 8000, "mulaw", 0.5)
    assert db(np.frombuffer(theirs, "<i2") / np.float32(32768), ours) > 45


@pytest.mark.parametrize("kind", get_args(KnownCodec))
def test_codecs_take_what_is_short_and_what_is_too_loud(kind: str) -> None:
    short = speech_like(0.025)
    assert effects.coded(short, RATE, kind, 0.9).shape == short.shape
    loud = 4 * speech_like(0.5)
    assert np.abs(loud).max() > 1
    assert np.abs(effects.coded(loud, RATE, kind, 0.5)).max() < 1.5  # nothing wrapped around
    wanted = effects.unclipped(loud)
    assert np.corrcoef(effects.coded(loud, RATE, kind, 0.5), wanted)[0, 1] > 0.9


@pytest.mark.parametrize("kind", get_args(KnownCodec))
def test_no_codec_silences_a_clip(kind: str) -> None:
    """Of silence some models have no features, and the example would be lost."""
    quiet = 1e-4 * speech_like(0.5)
    assert np.abs(quiet).max() < 10 ** (-74 / 20)
    assert effects.coded(quiet, RATE, kind, 0.9).any()


def test_what_is_too_loud_is_made_quieter() -> None:
    clip = speech_like()
    assert effects.unclipped(clip) is clip
    loud = effects.unclipped(-3 * clip / np.abs(clip).max())
    assert np.abs(loud).max() == pytest.approx(1)
    assert np.corrcoef(loud, -clip)[0, 1] == pytest.approx(1)


# -- stripes -------------------------------------------------------------------------------------


def bands(hidden: np.ndarray) -> int:
    """How many stretches of True there are."""
    return int((np.diff(hidden.astype(int), prepend=0) == 1).sum())


def test_stripes_are_as_wide_and_as_many_as_asked_and_hold_the_mean() -> None:
    features = np.random.default_rng(0).normal(3, 1, (202, 80)).astype(np.float32)
    spec = Spec(p=1, freq_masks=2, freq_width=27, time_masks=3, time_width=0.1)
    widths: list[int] = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        found = Spectrogram("features", tail=2).masked(features, 0, spec, rng)
        hidden = found != features
        assert np.unique(found[hidden]).size <= 1
        assert np.allclose(found[hidden], features[:200].mean(), atol=1e-5)
        frames, mels = hidden.all(axis=1), hidden.all(axis=0)
        assert np.array_equal(hidden, frames[:, None] | mels[None, :])
        assert bands(frames) <= 3 and bands(mels) <= 2
        assert frames.sum() <= 3 * 20 and mels.sum() <= 2 * 27
        assert not frames[200:].any()  # what stands behind the clip has no time
        widths.append(int(mels.sum()))
    assert min(widths) < 8 and max(widths) > 46
    assert np.mean(widths) == pytest.approx(27 * 0.85, rel=0.15)  # 27, less where they overlap


def test_stripes_of_rows_are_those_of_the_clip_and_end_with_it() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 40, 300)).astype(np.float32)
    spec = Spec(p=1, freq_masks=0, time_masks=1, time_width=1.0)
    seen = np.zeros(600, bool)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = Spectrogram("features", hop=160).masked(rows, 350 * 160 - 5, spec, rng)
        assert found.shape == rows.shape and found.flags["C_CONTIGUOUS"]
        hidden = np.concatenate((found != rows).all(axis=1))
        assert bands(hidden) <= 1
        seen |= hidden
    assert seen[:350].all() and not seen[350:].any()


def test_a_stripe_of_mels_hides_it_in_each_of_stacked_frames() -> None:
    features = np.random.default_rng(0).normal(size=(50, 160)).astype(np.float32)
    spec = Spec(p=1, freq_masks=1, freq_width=20, time_masks=0)
    found = Spectrogram("features", stacked=2).masked(features, 0, spec, np.random.default_rng(3))
    hidden = (found != features).all(axis=0)
    assert hidden.any() and np.array_equal(hidden[:80], hidden[80:])
