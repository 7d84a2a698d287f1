"""Mel-cepstral distortion: how far what was spoken is from the real clip, in dB.

Under `run`. Both waves at 16 kHz; frames of 25 ms each 10 ms; natural logarithms of the magnitudes
of 80 mel bins up to 8 kHz, above 1e-5 (`clips.mels`); their cepstra c_1 .. c_13 of

    ln |S(m)| = c_0 / 2 + sum_k c_k cos(pi k (m + 1/2) / 80)

aligned in time. Silence counts as all else does, and loudness (c_0) does not.

Costs 40 ms for two clips of 5 s on one core.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
from scipy.spatial.distance import cdist

from raysft.config.mel import Mel
from raysft.data.clips import mels
from raysft.data.clips.audio import resample

COEFFICIENTS = 13
ANALYSIS = Mel(rate=16000, n_fft=1024, win=400, hop=160, bins=80, fmin=0.0, fmax=8000.0, floor=1e-5)
DB = 10 / np.log(10)


def cepstra(wave: np.ndarray, rate: int) -> np.ndarray:
    """float32 [samples] at `rate` -> float64 [frames, COEFFICIENTS], without the 0th."""
    samples = resample(wave.astype(np.float32, copy=False), rate, ANALYSIS.rate)
    if len(samples) < ANALYSIS.n_fft:  # silence behind what is too short for a frame
        samples = np.pad(samples, (0, ANALYSIS.n_fft - len(samples)))
    logs = mels.log_mel(samples, ANALYSIS).astype(np.float64)
    return scipy.fft.dct(logs, type=2, axis=1)[:, 1 : COEFFICIENTS + 1] / ANALYSIS.bins


def aligned(costs: np.ndarray) -> tuple[float, int]:
    """Dynamic time warping over costs [n, m]: the least sum on a way from the first pair to the
    last by steps of one in either or both, each step as dear (Sakoe and Chiba, 1978, symmetric,
    without slope weights); and how many pairs that way has."""
    n, m = costs.shape
    total = np.full((n + 1, m + 1), np.inf)
    pairs = np.zeros((n + 1, m + 1), np.int64)
    total[0, 0] = 0.0
    for diagonal in range(2, n + m + 1):
        i = np.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        before = np.stack([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])
        counts = np.stack([pairs[i - 1, j - 1], pairs[i - 1, j], pairs[i, j - 1]])
        least, at = before.argmin(0), np.arange(len(i))
        total[i, j] = costs[i - 1, j - 1] + before[least, at]
        pairs[i, j] = 1 + counts[least, at]
    return float(total[n, m]), int(pairs[n, m])


def distortion(spoken: np.ndarray, real: np.ndarray, rate: int) -> float:
    """Mel-cepstral distortion in dB of two waves float32 [samples] at `rate`.

    10 / ln 10 * sqrt(2 * sum_k (c_k - c'_k)^2) of each pair of frames (Kubichek, 1993), the mean
    over the pairs that dynamic time warping aligns.
    """
    each = DB * np.sqrt(2) * cdist(cepstra(spoken, rate), cepstra(real, rate))
    total, pairs = aligned(each)
    return total / pairs
