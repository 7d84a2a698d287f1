"""From noise to speech: solvers of the ordinary differential equation of a flow.

Under whoever speaks: a network gives velocities, a schedule the times at which it is asked, a
solver the steps between them; guidance pushes away from what the network says without a condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from raysft.config.speaking import Flow

Velocity = Callable[[torch.Tensor, float], torch.Tensor]
"""(where [..., D], t) -> velocity [..., D]."""


def times(settings: Flow) -> list[float]:
    """From 0 (noise) to 1 (speech), steps + 1 of them.

    uniform: k / N. cosine: 1 - cos(pi t / 2) (CosyVoice). sway: t + s (cos(pi t / 2) - 1 + t), with
    s = sway (F5-TTS, Chen et al., 2024): below 0 most steps are near the noise. ming: as sway, of
    the times of Ming-UniAudio, which has 10 steps.
    """
    even = [step / settings.steps for step in range(settings.steps + 1)]
    if settings.schedule == "uniform":
        return even
    if settings.schedule == "cosine":
        return [1 - math.cos(math.pi * t / 2) for t in even]
    if settings.schedule == "ming":
        even = [t / 32 for t in (0, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)]
    return [t + settings.sway * (math.cos(math.pi * t / 2) - 1 + t) for t in even]


def guided(given: Velocity, bare: Velocity, guidance: float) -> Velocity:
    """v + guidance (v - v_null): the network with its condition, and without (Ho and Salimans,
    2022); guidance 0 asks the first alone."""
    if not guidance:
        return given

    def found(where: torch.Tensor, t: float) -> torch.Tensor:
        velocity = given(where, t)
        return velocity + guidance * (velocity - bare(where, t))

    return found


def solve(
    velocity: Velocity,
    noise: torch.Tensor,
    settings: Flow,
    normal: Callable[[], torch.Tensor] | None = None,
    at: Sequence[float] | None = None,
) -> torch.Tensor:
    """Where the flow carries `noise` [..., D] to.

    euler: a step along the velocity at its start. heun: along the mean of those at its start and at
    its end (the trapezoidal rule); asks the network twice. After each step noise of
    settings.noise * sqrt(1.5 |dt|) is added, where there is any (Ming-UniAudio: 0.25). normal:
    gives such noise, of the shape of `noise`. at: the times; default: those of the settings.
    """
    where = noise
    points = times(settings) if at is None else at
    for start, stop in pairwise(points):
        step = stop - start
        slope = velocity(where, start)
        if settings.solver == "heun":
            slope = (slope + velocity(where + step * slope, stop)) / 2
        where = where + step * slope
        if settings.noise and normal is not None:
            where = where + settings.noise * math.sqrt(1.5 * abs(step)) * normal()
    return where
