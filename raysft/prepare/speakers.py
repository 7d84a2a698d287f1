"""Embeddings of who speaks: rows of `raysft.config.listeners`, of clips at 16 kHz or a model's own
rate. As the models make them: neither normed nor centred."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raysft.config.listeners import SPEAKERS
from raysft.config.prepare import Speakers
from raysft.errors import BadExample, UserError
from raysft.prepare import pretrained
from raysft.prepare.features import RATE, kaldi_fbank
from raysft.prepare.listener import Listener
from raysft.prepare.onnx_model import OnnxModel

WINDOW = 400  # samples of a frame of fbank


class Campplus(Listener):
    """An ONNX model of [1, frames, 80]: Kaldi's fbank less each bin's mean over the clip."""

    sample_rate = RATE

    def __init__(self, settings: Speakers, folder: Path) -> None:
        self.model = OnnxModel(f"{SPEAKERS}.path", str(settings.path))

    def hear(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> float32 [dimensions]."""
        if len(clip) < WINDOW:
            raise BadExample(f"too short: {len(clip)} samples, a frame has {WINDOW}", "too short")
        made = self.model.hear(clip, _centred)
        return _vector(made.reshape(-1), f"{SPEAKERS}.path: {self.model.path}")


def _centred(clip: np.ndarray) -> tuple[np.ndarray, int]:
    bank = kaldi_fbank(clip)
    return (bank - bank.mean(axis=0, keepdims=True))[None], len(bank)


class XVector(Listener):
    """A model of transformers with a head of x-vectors."""

    def __init__(self, settings: Speakers, folder: Path) -> None:
        self.key, self.path = f"{SPEAKERS}.model", str(settings.model)
        self.extractor = pretrained.extractor(self.key, self.path, settings.revision)
        self.sample_rate = int(self.extractor.sampling_rate)
        self.net = pretrained.net(
            self.key, "AutoModelForAudioXVector", self.path, settings.revision
        )

    def hear(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> float32 [dimensions]."""

        def embed(samples: np.ndarray) -> np.ndarray:
            given = pretrained.inputs(self.extractor, samples, self.sample_rate)
            return self.net(**given).embeddings[0].cpu().numpy()

        made = pretrained.heard(self.key, self.path, clip, self.sample_rate, embed)
        return _vector(made, f"{self.key}: {self.path}")


def _vector(made: np.ndarray, where: str) -> np.ndarray:
    """float32 [dimensions]. Raises UserError where it is no number everywhere."""
    if not np.isfinite(made).all():
        raise UserError(f"{where} makes embeddings that are not finite: its weights are damaged")
    return np.ascontiguousarray(made, np.float32)
