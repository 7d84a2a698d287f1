"""Solvers against flows whose end is known."""

from __future__ import annotations

import math

import pytest
import torch

from raysft.config.speaking import Flow
from raysft.models.sampling import guided, solve, times


@pytest.mark.parametrize("schedule", ["uniform", "cosine", "sway", "ming"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_straight_flow_ends_at_the_data_whatever_the_steps(schedule: str, solver: str) -> None:
    noise, data = torch.randn(2, 4, 3, dtype=torch.float64)
    settings = Flow.model_validate({"schedule": schedule, "solver": solver, "steps": 10})
    found = solve(lambda where, t: data - noise, noise, settings)
    torch.testing.assert_close(found, data, rtol=0, atol=1e-12)


def test_heun_is_of_second_order_and_euler_of_first() -> None:
    # dx/dt = x, from 1: ends at e.
    def off(solver: str, steps: int) -> float:
        settings = Flow.model_validate({"solver": solver, "steps": steps})
        end = solve(lambda where, t: where, torch.ones(1, dtype=torch.float64), settings)
        return abs(float(end) - math.e)

    assert off("euler", 10) / off("euler", 20) == pytest.approx(2, rel=0.1)
    assert off("heun", 10) / off("heun", 20) == pytest.approx(4, rel=0.1)


def test_schedules_are_as_published() -> None:
    assert times(Flow(steps=4)) == [0, 0.25, 0.5, 0.75, 1]
    cosine = times(Flow(steps=2, schedule="cosine"))
    assert cosine == pytest.approx([0, 1 - math.cos(math.pi / 4), 1])
    sway = times(Flow(steps=2, schedule="sway"))
    assert sway == pytest.approx([0, 0.5 - (math.cos(math.pi / 4) - 0.5), 1])
    own = [t / 32 for t in (0, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)]
    ming = times(Flow(schedule="ming"))
    assert ming == pytest.approx([t - (math.cos(math.pi * t / 2) - 1 + t) for t in own])
    assert ming[1] - ming[0] < ming[-1] - ming[-2]


def test_guidance_pushes_away_from_what_is_said_without_a_condition() -> None:
    asked = []

    def bare(where: torch.Tensor, t: float) -> torch.Tensor:
        asked.append(t)
        return torch.full_like(where, 1.0)

    with_condition = guided(lambda where, t: torch.full_like(where, 3.0), bare, 2.0)
    assert float(with_condition(torch.zeros(1), 0.5)) == 3 + 2 * (3 - 1)
    assert asked == [0.5]
    alone = guided(lambda where, t: torch.full_like(where, 3.0), bare, 0.0)
    assert float(alone(torch.zeros(1), 0.5)) == 3 and asked == [0.5]


def test_noise_is_added_after_each_step_by_its_length() -> None:
    settings = Flow(steps=4, noise=0.25)
    found = solve(
        lambda where, t: torch.zeros_like(where), torch.zeros(1), settings, lambda: torch.ones(1)
    )
    assert float(found) == pytest.approx(4 * 0.25 * math.sqrt(1.5 * 0.25))
