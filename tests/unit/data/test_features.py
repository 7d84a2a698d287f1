"""Front ends give what transformers and Kaldi give, and say beforehand how many frames."""

import subprocess
import sys

import numpy as np
import pytest

from raysft.data.clips.features import Fbank, LogMel, ModelExtractor


def clip(samples: int, seed: int = 0) -> np.ndarray:
    """A buzz that comes and goes over faint noise."""
    time = np.arange(samples) / 16000
    buzz = sum(np.sin(2 * np.pi * 120 * k * time) / k for k in range(1, 30))
    noise = np.random.default_rng(seed).normal(0, 1e-3, samples)
    return (0.1 * buzz * np.clip(np.sin(9 * time), 0, 1) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def whisper():
    from transformers import WhisperFeatureExtractor

    return {n: WhisperFeatureExtractor(feature_size=n, chunk_length=4) for n in (80, 128)}


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("samples", [400, 16000, 16001, 16159, 31999, 48000])
def test_log_mel_equals_the_frames_the_model_sees_of_the_padded_chunk(whisper, mels, samples):
    wave = clip(samples)
    theirs = whisper[mels](
        wave, sampling_rate=16000, return_attention_mask=True, return_tensors="np"
    )
    kept = int(theirs["attention_mask"][0].sum())
    front_end = LogMel(mels=mels)
    ours = front_end(wave)
    assert ours.dtype == np.float32
    assert ours.shape == (front_end.frames(samples) + front_end.tail, mels)
    assert front_end.frames(samples) == kept
    # The whole chunk: the clip, the frames behind it that hear its end, and silence.
    np.testing.assert_allclose(front_end.pad(ours, 400), theirs["input_features"][0].T, atol=1e-4)


@pytest.mark.parametrize("sound", ["silence", "faint noise", "click at the end", "loud"])
@pytest.mark.parametrize("samples", [4000, 63640, 63800, 63841, 64000])
def test_log_mel_equals_the_padded_chunk_where_the_clip_fills_it_or_is_silent(
    whisper, samples, sound
):
    wave = np.zeros(samples, np.float32)
    if sound == "click at the end":
        wave[-1] = 1
    elif sound != "silence":
        wave = clip(samples) * np.float32(3 if sound == "loud" else 1e-6)
    theirs = whisper[80](wave, sampling_rate=16000, return_tensors="np")["input_features"][0].T
    front_end = LogMel(chunk=64000)
    np.testing.assert_allclose(front_end.pad(front_end(wave), 400), theirs, atol=1e-4)


def test_log_mel_equals_the_unpadded_extractor_up_to_the_frames_that_see_the_end(whisper):
    wave = clip(16077)
    theirs = whisper[80](wave, sampling_rate=16000, padding=False, truncation=False)
    theirs = np.asarray(theirs["input_features"][0]).T
    np.testing.assert_allclose(LogMel()(wave)[:99], theirs[:99], atol=1e-4)


def test_padding_cuts_the_tail_where_the_clip_fills_the_chunk():
    features = np.ones((302, 80), np.float32)
    assert LogMel().pad(features, 300).shape == (300, 80)
    with pytest.raises(ValueError, match="300 frames do not fit into 299"):
        LogMel().pad(features, 299)


@pytest.mark.parametrize("samples", [400, 559, 560, 16000, 16001, 31999])
def test_fbank_is_mean_normalised_and_as_long_as_it_says(samples):
    features = Fbank()(clip(samples))
    assert features.shape == (Fbank().frames(samples), 80)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)


def test_another_extractor_is_called_as_it_is():
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80, dither=0.0)
    front_end = ModelExtractor(extractor, 16000, 80)
    wave = clip(8000)
    theirs = extractor(wave, sampling_rate=16000, padding=False, truncation=False)
    assert front_end(wave).shape == (front_end.frames(8000), 80)
    np.testing.assert_array_equal(front_end(wave), np.asarray(theirs["input_features"][0]).T)


def test_log_mel_and_speech_tokens_need_no_torch():
    code = (
        "import sys, numpy as np; from raysft.data.clips.features import LogMel; "
        "import raysft.data.encode.base, raysft.data.clips.speech_tokens; "
        "LogMel()(np.zeros(4000, np.float32)); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
