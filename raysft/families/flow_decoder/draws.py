"""What is random in the loss of an example: a function of the seed that its encoder has drawn.

Between `encode` (which draws the seed) and `model` (which makes the batch, and counts what is
scored): numpy alone, so that neither device, worker nor the other rows of a batch matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from raysft.families.flow_decoder.config import FlowDecoderConfig

T_BITS = 24


@dataclass(frozen=True)
class Draws:
    """units: the time, in 2^-24. dropped: whether all conditions are left out. start, stop: of the
    frames of the mel that are given. scored: frames that the loss is of."""

    units: int
    dropped: bool
    start: int
    stop: int
    scored: int


def drawn(seed: int, frames: int, config: FlowDecoderConfig) -> tuple[Draws, np.random.Generator]:
    """The draws of an example of so many frames, and what its noise is drawn from then.

    dit: conditions are dropped with training_cfg_rate, and, drawn apart, a prefix of the mel is
    given, which is scored all the same (CosyVoice). voicebox: conditions are dropped, or else a
    span of the mel may be given, which is not scored (USDM).
    """
    rng = np.random.default_rng(seed)
    units = int(rng.integers(1 << T_BITS))
    dropped = bool(rng.random() < config.training_cfg_rate)
    given = bool(rng.random() < (config.prompt_rate or 0.0))
    most = int(config.prompt_share * frames)
    length = int(rng.integers(most + 1))
    start = int(rng.integers(frames - length + 1))
    if config.of_voicebox:
        given = given and not dropped
    else:
        start = 0
    if not given:
        start = length = 0
    scored = frames - length if config.of_voicebox else frames
    return Draws(units, dropped, start, start + length, scored), rng
