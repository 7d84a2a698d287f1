"""What ONNX models hear with: features as those compute them whose models they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RATE = 16_000

Features = Callable[[np.ndarray], tuple[np.ndarray, int]]
"""A clip -> float32 features with a batch of 1 in front, and their length in frames or samples."""


def _wave() -> Features:
    return lambda clip: (clip[None], len(clip))


def _whisper() -> Features:
    """[1, 128, samples // 160]: of the clip alone, its ends mirrored, nothing behind it."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=128)

    def mels(clip: np.ndarray) -> tuple[np.ndarray, int]:
        made = extractor(
            clip, sampling_rate=RATE, padding=False, truncation=False, return_tensors="np"
        )
        features = np.asarray(made["input_features"], np.float32)
        return features, features.shape[2]

    return mels


def _fbank() -> Features:
    def bank(clip: np.ndarray) -> tuple[np.ndarray, int]:
        features = kaldi_fbank(clip)
        return features[None], len(features)

    return bank


def kaldi_fbank(clip: np.ndarray) -> np.ndarray:
    """Kaldi's log-mel filter bank of a clip of -1 .. 1, without dither: float32 [frames, 80]."""
    import torch
    from torchaudio.compliance import kaldi

    wave = torch.from_numpy(np.ascontiguousarray(clip))[None]
    return kaldi.fbank(wave, num_mel_bins=80, dither=0, sample_frequency=RATE).numpy()


FEATURES: dict[str, Callable[[], Features]] = {
    "whisper_mel128": _whisper,
    "fbank80": _fbank,
    "wave": _wave,
}
