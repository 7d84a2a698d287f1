"""Mel-cepstral distortion against another computation of each of its parts, written plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raysft.data.clips.audio import resample
from raysft.hearing.distortion import aligned, distortion


def speech(seed: int, seconds: float = 0.4, rate: int = 16000) -> np.ndarray:
    """Harmonics that glide, in noise, quiet at both ends."""
    rng = np.random.default_rng(seed)
    at = np.arange(int(seconds * rate)) / rate
    pitch = 2 * np.pi * ((100 + 40 * seed) * at + 30 * at**2)
    wave = sum(np.sin(k * pitch) / (k + seed) for k in range(1, 12))
    wave = 0.1 * wave + 0.005 * rng.standard_normal(len(at))
    return (wave * np.hanning(len(at))).astype(np.float32)


def cepstra(wave: np.ndarray) -> list[list[float]]:
    """By torchaudio's mel filters and sums of cosines."""
    from torchaudio.functional import melscale_fbanks

    padded = torch.nn.functional.pad(torch.from_numpy(wave)[None], (432, 432), "reflect")[0]
    window = torch.zeros(1024)
    window[312:712] = torch.hann_window(400)
    sizes = torch.fft.rfft(padded.unfold(0, 1024, 160) * window).abs()
    filters = melscale_fbanks(513, 0.0, 8000.0, 80, 16000, norm="slaney", mel_scale="slaney")
    logs = (sizes.double() @ filters.double()).clamp(min=1e-5).log().tolist()
    return [
        [
            2 / 80 * sum(v * math.cos(math.pi * k * (m + 0.5) / 80) for m, v in enumerate(frame))
            for k in range(1, 14)
        ]
        for frame in logs
    ]


def warped(costs: list[list[float]]) -> tuple[float, int]:
    """A cell after the other."""
    total = {(0, 0): (0.0, 0)}
    for i, row in enumerate(costs, 1):
        for j, cost in enumerate(row, 1):
            ways = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
            best = min((total[way] for way in ways if way in total), key=lambda one: one[0])
            total[i, j] = (best[0] + cost, best[1] + 1)
    return total[len(costs), len(costs[0])]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (6, 11), (30, 23)])
def test_the_way_is_the_cheapest(shape: tuple[int, int]) -> None:
    costs = np.random.default_rng(shape[0]).random(shape)
    total, pairs = aligned(costs)
    expected = warped(costs.tolist())
    assert total == pytest.approx(expected[0], rel=1e-12) and pairs == expected[1]


def test_the_distortion_is_the_formulas_over_that_way() -> None:
    one, other = speech(1), speech(3, 0.5)
    a, b = cepstra(one), cepstra(other)
    costs = [
        [10 / math.log(10) * math.sqrt(2 * sum((x - y) ** 2 for x, y in zip(p, q))) for q in b]
        for p in a
    ]
    total, pairs = warped(costs)
    assert distortion(one, other, 16000) == pytest.approx(total / pairs, rel=1e-3)


def test_it_is_blind_to_loudness_and_tempo_and_not_to_what_is_said() -> None:
    one, other = speech(1), speech(4)
    same = distortion(one, one, 16000)
    louder = distortion(one, 2 * one, 16000)
    assert same == 0
    paused = np.concatenate([one[:3200], one[2400:3200], one[3200:]])
    assert distortion(one, paused, 16000) < 0.3 * distortion(one, other, 16000)
    assert louder < 0.2 * distortion(one, other, 16000)
    assert distortion(one, other, 16000) == pytest.approx(distortion(other, one, 16000))


def test_rates_are_no_difference_and_what_is_short_has_one_frame_at_least() -> None:
    one = speech(1, rate=24000)
    down = resample(one, 24000, 16000)
    other = speech(2)
    at_16, at_24 = (
        distortion(down, other, 16000),
        distortion(one, resample(other, 16000, 24000), 24000),
    )
    assert at_24 == pytest.approx(at_16, rel=0.02)
    assert math.isfinite(distortion(one[:50], other, 16000))
