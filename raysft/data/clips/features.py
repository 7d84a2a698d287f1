"""Front ends: mono samples -> the frames a model or a speech tokenizer reads.

Stands in the data tasks between `audio.load` and the encoders. Three front ends share one small
interface (`frames`, `__call__`, `pad`): Whisper's log-mel in numpy (no torch), Kaldi's fbank
through torchaudio, and, for models that bring an extractor of another class, that extractor.

Whisper-like models read clips zero-padded to a chunk (30 s). Computing the whole chunk costs far
more than a clip of 2 s, so `LogMel` computes the clip's own ceil(samples / hop) frames, all that
the chunk's attention mask keeps, and a tail: the two frames behind them that still hear the clip's
end, which an encoder's convolutions look at. What follows is silence, which `pad` appends. So
padded, the features equal the extractor's on the whole chunk to 4e-5. The extractor's own
`padding=False` does not: it mirrors the clip's end (the last frames differ by up to 0.2 of a range
of 2 where sound is cut off) and drops the frame that the clip does not fill.

Costs on one core for a clip of 2 s at 16 kHz, 80 mels: LogMel 0.35 ms (2,900 clips/s;
WhisperFeatureExtractor 0.8 ms without its padding, 15 ms with it), Fbank 1.1 ms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import scipy.fft
import scipy.sparse

from raysft.config.schema import Model
from raysft.data import remote_code
from raysft.errors import UserError, first_line
from raysft.json_types import JsonObject

LOG_FLOOR = 1e-10  # power below which Whisper's log-mel does not go
LOG10_E = 0.4342944819032518
FLOOR = -1.5  # of Whisper's log-mel: LOG_FLOOR, scaled as (log10(power) + 4) / 4
RANGE = 2.0  # of Whisper's log-mel: 8 decades of power, scaled by 1/4


class FrontEnd(Protocol):
    """What turns a clip into frames."""

    @property
    def sample_rate(self) -> int:
        """Hz."""

    @property
    def mels(self) -> int:
        """Of a frame."""

    @property
    def tail(self) -> int:
        """Frames computed behind the clip, which still hear its end."""

    def frames(self, samples: int) -> int:
        """Frames of a clip of so many samples, without the tail."""

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> float32 [frames(samples) + tail, mels]."""

    def pad(self, features: np.ndarray, frames: int) -> np.ndarray:
        """Append silence, as this front end shows it, or cut the tail: [frames, mels]."""


@dataclass(frozen=True)
class LogMel:
    """Whisper's log-mel, as WhisperFeatureExtractor computes it on the zero-padded chunk.

    Hann window, power spectrum, Slaney mel scale 0..8000 Hz, log10, at most 8 decades below the
    clip's maximum, (x + 4) / 4. Radford et al. 2022, section 2.2. chunk: its samples, for the
    chunk's last frame mirrors what it hears of a clip that fills it; None: endless silence.
    """

    sample_rate: int = 16000
    mels: int = 80
    n_fft: int = 400
    hop: int = 160
    chunk: int | None = None

    @property
    def tail(self) -> int:
        """Frames behind the clip whose window reaches back into it, at most."""
        return -(-self.n_fft // 2 // self.hop)

    def frames(self, samples: int) -> int:
        """ceil(samples / hop)."""
        return -(-samples // self.hop)

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> float32 [ceil(samples / hop) + tail, mels].

        n_fft / 2 < samples <= chunk. Frames behind the chunk's end hold nothing of use.
        """
        half, count = self.n_fft // 2, self.frames(len(clip)) + self.tail
        padded = np.zeros((count - 1) * self.hop + self.n_fft, np.float32)
        padded[:half] = clip[half:0:-1]  # the start of the chunk is mirrored
        body = clip[: len(padded) - half]
        padded[half : half + len(body)] = body
        inside = count
        if self.chunk is not None:
            inside = self.chunk // self.hop
            end = half + self.chunk
            behind = padded[end : end + half]
            behind[:] = padded[end - 1 - len(behind) : end - 1][::-1]
        window, filters = hann(self.n_fft), mel_filters(self.sample_rate, self.mels, self.n_fft)
        framed = np.lib.stride_tricks.sliding_window_view(padded, self.n_fft)[:: self.hop]
        # scipy transforms several frames at once in float32: 7 times as fast as numpy.fft.
        spectrum = scipy.fft.rfft(framed * window, axis=1)
        power = spectrum.real**2 + spectrum.imag**2
        # 98% of the filters are zeros. Sparse is faster than a dense product, and its rounding does
        # not depend on how many threads BLAS has here.
        mels = (filters @ np.ascontiguousarray(power.T)).T
        # float32 has a fast natural logarithm, and no fast log10.
        logs = np.log(np.maximum(mels, np.float32(LOG_FLOOR))) * np.float32(LOG10_E)
        logs = np.maximum(logs, logs[:inside].max() - 8)
        return np.ascontiguousarray((logs + 4) / 4)

    def pad(self, features: np.ndarray, frames: int) -> np.ndarray:
        """Append what the chunk has after the clip: 8 decades below its maximum, or the floor."""
        value = max(float(features.max()) - RANGE, FLOOR)
        return _pad(features, frames, value, self.tail)


@dataclass(frozen=True)
class Fbank:
    """Kaldi's log-mel filter bank (25 ms povey windows each 10 ms, no dither), mean-normalised.

    Each mel bin's mean over the clip is subtracted. Torch is imported at the first call.
    """

    sample_rate: int = 16000
    mels: int = 80
    tail = 0

    def frames(self, samples: int) -> int:
        """Whole windows of 25 ms, one each 10 ms; 0 for a clip shorter than a window."""
        window, hop = self.sample_rate * 25 // 1000, self.sample_rate // 100
        return max(0, 1 + (samples - window) // hop)

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> float32 [frames(samples), mels], zero mean over frames."""
        import torch
        from torchaudio.compliance import kaldi

        # Kaldi counts in 16-bit steps; this moves the floor, not the mean-normalised rest.
        wave = torch.from_numpy(clip * np.float32(32768))[None]
        bank = kaldi.fbank(
            wave,
            sample_frequency=self.sample_rate,
            num_mel_bins=self.mels,
            frame_length=25.0,
            frame_shift=10.0,
            dither=0.0,
        ).numpy()
        return mean_normalised(bank)

    def pad(self, features: np.ndarray, frames: int) -> np.ndarray:
        """Append zeros: the mean of every clip."""
        return _pad(features, frames, 0.0)


@dataclass(frozen=True)
class ModelExtractor:
    """A model's own extractor of any other class, called clip by clip without padding.

    `extractor` is a transformers feature extractor whose output is `input_features` [1, frames,
    mels] or [1, mels, frames]. Frames of a length are found by extracting silence of that length.
    """

    extractor: Any
    sample_rate: int
    mels: int
    tail = 0
    _counts: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, object]:
        extractor = remote_code.packed(self.extractor, "AutoFeatureExtractor")
        return {**self.__dict__, "extractor": extractor}

    def __setstate__(self, state: JsonObject) -> None:
        extractor = remote_code.unpacked(state["extractor"])
        self.__dict__.update({**state, "extractor": extractor})

    def frames(self, samples: int) -> int:
        """Frames of a clip of so many samples: measured once a length, then remembered."""
        if samples not in self._counts:
            self._counts[samples] = len(self(np.zeros(samples, np.float32)))
        return self._counts[samples]

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> float32 [frames(samples), mels]."""
        output = self.extractor(
            clip,
            sampling_rate=self.sample_rate,
            padding=False,
            truncation=False,
            return_tensors="np",
        )
        features = np.asarray(output["input_features"][0], np.float32)
        return np.ascontiguousarray(features if features.shape[1] == self.mels else features.T)

    def pad(self, features: np.ndarray, frames: int) -> np.ndarray:
        """Append the extractor's own padding value."""
        return _pad(features, frames, float(self.extractor.padding_value))


def load_extractor(model: Model) -> Any:
    """The feature extractor of transformers in model.path. Raises UserError where there is none."""
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(model.path, **model.hub)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: no feature extractor there: {first_line(error)}") from None


def mean_normalised(features: np.ndarray) -> np.ndarray:
    """[frames, mels] with each mel bin's mean over the frames taken off."""
    return features - features.mean(axis=0, dtype=np.float32)


def _pad(features: np.ndarray, frames: int, value: float, tail: int = 0) -> np.ndarray:
    if len(features) - tail > frames:
        raise ValueError(f"{len(features) - tail} frames do not fit into {frames}")
    padded = np.full((frames, features.shape[1]), value, np.float32)
    padded[: len(features)] = features[:frames]
    return padded


@lru_cache(maxsize=8)
def hann(size: int) -> np.ndarray:
    """Periodic Hann window, float32 [size]."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


@lru_cache(maxsize=8)
def mel_filters(
    rate: int, mels: int, n_fft: int, low: float = 0.0, high: float = 8000.0
) -> scipy.sparse.csr_matrix:
    """Triangles of equal area on Slaney's mel scale, low..high Hz: float32 [mels, n_fft // 2 + 1].

    The scale is linear to 1000 Hz (3 mels a 200 Hz) and logarithmic above (27 mels a factor 6.4).
    Slaney, Auditory Toolbox (1998).
    """
    knee_hz, knee_mel, step = 1000.0, 15.0, np.log(6.4) / 27

    def mel_of(hz: float) -> float:
        return hz * 3 / 200 if hz < knee_hz else knee_mel + np.log(hz / knee_hz) / step

    points = np.linspace(mel_of(low), mel_of(high), mels + 2)
    edges = np.where(
        points < knee_mel, points * 200 / 3, knee_hz * np.exp((points - knee_mel) * step)
    )
    bins = np.linspace(0.0, rate / 2, n_fft // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0.0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
    return scipy.sparse.csr_matrix(triangles.T.astype(np.float32))
