"""Losses of speech against what their formulas say, by loops: flow matching, and where it stops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raysft.losses.flow_matching import squares, way
from raysft.losses.stop import labels, stop_loss


@pytest.mark.parametrize("sigma", [0.0, 1e-4, 0.3])
def test_the_way_is_straight_from_noise_to_data(sigma: float) -> None:
    rng = np.random.default_rng(0)
    noise, data = rng.standard_normal((2, 5, 3, 4))
    t = rng.random(5)
    found = way(*map(torch.from_numpy, (noise, data)), torch.from_numpy(t).view(-1, 1, 1), sigma)
    for row in range(5):
        at = (1 - (1 - sigma) * t[row]) * noise[row] + t[row] * data[row]
        np.testing.assert_allclose(found.at[row].numpy(), at, rtol=0, atol=1e-12)
        # The velocity is how the place changes with t.
        later = (1 - (1 - sigma) * (t[row] + 1e-3)) * noise[row] + (t[row] + 1e-3) * data[row]
        np.testing.assert_allclose(found.velocity[row].numpy(), (later - at) / 1e-3, atol=1e-9)


def test_squares_are_summed_over_the_values_of_a_frame() -> None:
    one, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    found = squares(one, other)
    assert found.shape == (2, 3)
    expected = sum((float(one[1, 2, i]) - float(other[1, 2, i])) ** 2 for i in range(4))
    assert float(found[1, 2]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("patches", "expected"),
    [
        (0, []),
        (1, [1]),
        (2, [-100, 1]),
        (4, [-100, -100, -100, 1]),
        (5, [0, -100, -100, -100, 1]),
        (8, [0, 0, 0, 0, -100, -100, -100, 1]),
    ],
)
def test_the_last_patch_stops_and_the_three_before_it_are_undecided(
    patches: int, expected: list[int]
) -> None:
    assert labels(patches).tolist() == expected


def by_loops(logits: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean over utterances of -log p(stop) at the last patch; mean over those with a patch that
    goes on of the largest -log p(goes on) among these."""
    last, hardest, start = [], [], 0
    for length in lengths:
        own = logits[start : start + length]
        chances = own.exp() / own.exp().sum(1, keepdim=True)
        last.append(-chances[length - 1, 1].log())
        going = [-chances[place, 0].log() for place in range(length - 4)]
        if going:
            hardest.append(torch.stack(going).max())
        start += length
    return torch.stack(last).mean(), torch.stack(hardest).mean() if hardest else None


@pytest.mark.parametrize("lengths", [[9, 3, 6, 1, 5], [12], [2, 4]])
def test_stops_and_the_hardest_that_go_on(lengths: list[int]) -> None:
    torch.manual_seed(len(lengths))
    logits = torch.randn(sum(lengths), 2, requires_grad=True)
    wanted = torch.from_numpy(np.concatenate([labels(length) for length in lengths]))
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    found = stop_loss(logits, wanted, owners, len(lengths))
    last, hardest = by_loops(logits, lengths)
    assert found.goes_on.tolist() == [length > 4 for length in lengths]
    rows = found.goes_on.sum()
    own = [found.last.sum() / len(lengths)]
    expected = [last]
    if hardest is not None:
        own.append(found.hardest.sum() / rows)
        expected.append(hardest)
    else:
        assert float(found.hardest.sum()) == 0
    torch.testing.assert_close(torch.stack(own), torch.stack(expected), rtol=0, atol=1e-6)
    gradients = [
        torch.autograd.grad(sum(terms), logits, retain_graph=True)[0] for terms in (own, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_chances_that_round_to_one_have_no_gradient_and_are_finite() -> None:
    logits = torch.tensor([[60.0, -60.0]] * 5 + [[-60.0, 60.0]], requires_grad=True)
    wanted = torch.from_numpy(labels(6))
    found = stop_loss(logits, wanted, torch.zeros(6, dtype=torch.long), 1)
    total = found.last.sum() + found.hardest.sum()
    total.backward()
    assert float(total.detach()) == 0 and logits.grad is not None
    assert math.isfinite(float(logits.grad.abs().sum()))
