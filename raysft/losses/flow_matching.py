"""Conditional flow matching: a network learns the velocity that carries noise to data.

Between a network that predicts velocities and the terms of the loss: where on the way from noise
to data an element stands, which way it goes from there, and how far a prediction is off. What is
random (t, noise, which conditions are dropped) is given: see `draws`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Way(NamedTuple):
    """Where elements stand between noise and data, and which way they go.

    at: [..., D], the network's input. velocity: [..., D], what it is to predict.
    """

    at: torch.Tensor
    velocity: torch.Tensor


def way(noise: torch.Tensor, data: torch.Tensor, t: torch.Tensor, sigma: float = 0.0) -> Way:
    """The straight path: x_t = (1 - (1 - sigma) t) x0 + t x1, u = x1 - (1 - sigma) x0.

    noise, data: x0 and x1 [..., D]. t: 0 (noise) to 1 (data), broadcastable to them. sigma: of the
    noise left at t = 1. As in Lipman et al., "Flow Matching for Generative Modeling" (2023), II;
    with sigma 0 it is the rectified flow of Liu et al. (2023).
    """
    left = 1 - sigma
    return Way((1 - left * t) * noise + t * data, data - left * noise)


def squares(predicted: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """Squared errors summed over the last dimension, in float32: [..., D] -> [...].

    The loss is their sum over what counts, divided by the number of values that count.
    """
    return (predicted.float() - velocity.float()).square().sum(-1)
