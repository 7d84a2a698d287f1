"""The log-mel of vocoders against torch and torchaudio, and its sections of the config."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchaudio
from pydantic import ValidationError

from raysft.config.mel import Mel
from raysft.data.clips import mels

SETTINGS = {
    "step": Mel(),
    "usdm": Mel(preset="usdm"),
    "odd": Mel(rate=16000, n_fft=513, win=400, hop=160, bins=64, fmin=60.0, fmax=7600.0),
}


def reference(wave: np.ndarray, mel: Mel) -> np.ndarray:
    """By torch.stft and torchaudio's filters, in float64."""
    beside = (mel.n_fft - mel.hop) // 2
    padded = torch.nn.functional.pad(
        torch.from_numpy(wave.astype(np.float64))[None, None], (beside, beside), mode="reflect"
    )[0]
    spectrum = torch.stft(
        padded,
        mel.n_fft,
        mel.hop,
        mel.win,
        torch.hann_window(mel.win, dtype=torch.float64),
        center=False,
        return_complex=True,
    )[0]
    sizes = (spectrum.abs() ** 2 + 1e-9).sqrt()
    filters = torchaudio.functional.melscale_fbanks(
        mel.n_fft // 2 + 1,
        mel.fmin,
        mel.fmax,
        mel.bins,
        mel.rate,
        norm="slaney",
        mel_scale="slaney",
    ).double()
    logs = (sizes.T @ filters).clamp(min=mel.floor).log()
    return ((logs - mel.mean) / mel.std).numpy()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("samples", [1000, 4800, 24000, 31337])
def test_log_mel_is_that_of_torch_and_torchaudio(name: str, samples: int) -> None:
    mel = SETTINGS[name]
    rng = np.random.default_rng(samples)
    sweep = np.sin(np.arange(samples) ** 1.5 / 300)
    wave = (0.3 * sweep + 0.01 * rng.standard_normal(samples)).astype(np.float32)
    found, expected = mels.log_mel(wave, mel), reference(wave, mel)
    assert found.dtype == np.float32
    assert len(found) == mels.frames(samples, mel)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_silence_is_the_floor() -> None:
    found = mels.log_mel(np.zeros(4800, np.float32), Mel())
    expected = reference(np.zeros(4800, np.float32), Mel())
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.max() < np.log(1e-5) + 1.0


@pytest.mark.parametrize("name", ["step", "usdm"])
def test_a_frame_is_hop_samples(name: str) -> None:
    mel = SETTINGS[name]
    for samples in (mels.margin(mel) + 1, 1024, 1439, 1440, 24000, 24001):
        assert mels.frames(samples, mel) == samples // mel.hop
        assert len(mels.log_mel(np.ones(samples, np.float32), mel)) == samples // mel.hop


def test_a_clip_that_is_too_short_has_no_frame() -> None:
    mel = Mel()
    assert mels.frames(mels.margin(mel), mel) == 0
    with pytest.raises(ValueError, match="720 samples give no frame"):
        mels.log_mel(np.ones(720, np.float32), mel)


def test_presets_give_what_is_left_out() -> None:
    step, usdm = Mel(preset="step"), Mel(preset="usdm", bins=100)
    assert step == Mel()
    assert (step.rate, step.hop, step.n_fft, step.win, step.bins) == (24000, 480, 1920, 1920, 80)
    assert (step.mean, step.std, step.frames_per_second) == (0.0, 1.0, 50.0)
    assert (usdm.rate, usdm.hop, usdm.n_fft, usdm.win, usdm.bins) == (22050, 256, 1024, 1024, 100)
    assert (usdm.mean, usdm.std, usdm.fmax) == (-5.5419, 2.1575, 8000.0)
    assert Mel.model_validate(usdm.model_dump()) == usdm


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "hifigan"}, "'step' or 'usdm'"),
        ({"rate": 8000}, r"fmax 8000 Hz.*half the rate \(4000 Hz\)"),
        ({"fmin": 9000.0}, "expected to rise"),
        ({"n_fft": 1024}, "win 1920 is longer than n_fft 1024"),
        ({"hop": 4000}, "hop 4000 is longer"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(given: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Mel.model_validate(given)
