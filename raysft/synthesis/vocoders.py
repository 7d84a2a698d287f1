"""Vocoders: frames of log-mel -> a wave.

Under whoever speaks. `griffin_lim` needs no weights; others are models of transformers, by a folder
or a hub id, and have to read the mel that is spoken.

Costs 0.15 s for a second of speech by Griffin-Lim on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from raysft.config.mel import Mel
from raysft.data.clips.features import mel_filters
from raysft.errors import UserError, first_line

GRIFFIN_LIM = "griffin_lim"
ROUNDS = 60  # of Griffin-Lim
MOMENTUM = 0.99  # of its fast form (Perraudin et al., 2013)


class Vocoder(Protocol):
    """rate: Hz of its waves."""

    rate: int

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """float32 [frames, bins] -> float32 [samples], within -1 and 1."""


class GriffinLim:
    """Magnitudes by least squares of the mel filters, phases by Griffin and Lim (1984)."""

    def __init__(self, mel: Mel) -> None:
        self.mel, self.rate = mel, mel.rate
        filters = mel_filters(mel.rate, mel.bins, mel.n_fft, mel.fmin, mel.fmax)
        self._inverse = torch.from_numpy(np.linalg.pinv(filters.toarray().astype(np.float64)))

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """See `Vocoder`. Draws nothing: the same frames are the same wave."""
        from torchaudio.functional import griffinlim  # a second of imports

        mel = self.mel
        logs = torch.from_numpy(frames.astype(np.float64)) * mel.std + mel.mean
        logs = torch.cat([logs, logs[-1:]])  # whose middle lies at the end of the wave
        magnitudes = (self._inverse @ logs.exp().T).clamp(min=0).float()
        wave = griffinlim(
            magnitudes,
            torch.hann_window(mel.win),
            n_fft=mel.n_fft,
            hop_length=mel.hop,
            win_length=mel.win,
            power=1.0,
            n_iter=ROUNDS,
            momentum=MOMENTUM,
            length=len(frames) * mel.hop,
            rand_init=False,
        )
        return _within(wave.numpy())


class HubVocoder:
    """A vocoder of transformers: SpeechT5's HiFi-GAN, or UnivNet."""

    def __init__(self, name: str, mel: Mel) -> None:
        """Raises UserError where it cannot be had, or reads another mel."""
        from transformers import AutoConfig, SpeechT5HifiGan, UnivNetModel

        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"speak.vocoder: no vocoder at {name!r}: {first_line(error)}") from None
        kinds = {"speecht5_hifigan": SpeechT5HifiGan, "univnet": UnivNetModel}
        if config.model_type not in kinds:
            raise UserError(
                f"speak.vocoder: {name} is of type {config.model_type}; expected a vocoder of type "
                f"{' or '.join(kinds)}, or {GRIFFIN_LIM}"
            )
        hifigan = config.model_type == "speecht5_hifigan"
        own = {
            "rate": config.sampling_rate if hifigan else _rate(name),
            "bins": config.model_in_dim if hifigan else config.num_mel_bins,
            "hop": int(np.prod(config.upsample_rates if hifigan else config.resblock_stride_sizes)),
        }
        for key, value in own.items():
            if getattr(mel, key) != value:
                raise UserError(
                    f"speak.vocoder: {name} reads mel spectrograms of {key} {value}, and the model "
                    f"speaks them with {key} {getattr(mel, key)}: name a vocoder that reads those, "
                    f"or {GRIFFIN_LIM}"
                )
        self.rate = mel.rate
        self._mel = mel
        self._net = kinds[config.model_type].from_pretrained(name, use_safetensors=True).eval()
        self._hifigan = hifigan

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """See `Vocoder`."""
        logs = torch.from_numpy(frames).float() * self._mel.std + self._mel.mean
        if self._hifigan:
            return _within(self._net(logs).flatten().numpy())
        found = self._net(logs.unsqueeze(0), generator=torch.Generator().manual_seed(0))
        return _within(found.waveforms.flatten().numpy())


class Decoder:
    """A codec's own decoder."""

    def __init__(self, waves: Callable[[np.ndarray], np.ndarray], rate: int) -> None:
        """waves: float32 [frames, width] -> [samples] at `rate` Hz."""
        self.waves, self.rate = waves, rate

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """See `Vocoder`; frames: [frames, width]."""
        return _within(self.waves(frames))


class Raw:
    """No vocoder: latents as the data has them."""

    def __init__(self, raw: Callable[[np.ndarray], np.ndarray], rate: float) -> None:
        """raw: float32 [frames, width] -> the same. rate: frames a second."""
        self.raw, self.rate = raw, rate

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """float32 [frames, width] -> the same, not normalised."""
        return self.raw(frames).astype(np.float32)


def _rate(name: str) -> int:
    """Hz of a UnivNet, which its feature extractor says."""
    from transformers import UnivNetFeatureExtractor

    try:
        return int(UnivNetFeatureExtractor.from_pretrained(name).sampling_rate)
    except (OSError, ValueError) as error:
        raise UserError(
            f"speak.vocoder: {name} has no feature extractor, which says its rate: "
            f"{first_line(error)}"
        ) from None


def vocoder_of(name: str, mel: Mel) -> Vocoder:
    """What `speak.vocoder` names, for this mel. Raises UserError where it cannot be had."""
    return GriffinLim(mel) if name == GRIFFIN_LIM else HubVocoder(name, mel)


def _within(wave: np.ndarray) -> np.ndarray:
    """`wave`, made quieter where it is beyond -1 or 1."""
    peak = float(np.abs(wave).max(initial=0.0))
    return (wave / peak if peak > 1 else wave).astype(np.float32)
