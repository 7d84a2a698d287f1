"""What was proven of a model before its run, for encoders and workers alike: see `models.proof`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Batched = Literal["any", "length", "one"]


@dataclass(frozen=True)
class Verdict:
    """What is exact. A reason that is None: it is.

    model_type: of the text model. causal, padded, packed: why not. differs: whether one of these
    is a difference that was measured, which other weights may not show. windows: packed rows need
    the config's sliding window, which this model puts into its mask. answers: which prompts may
    share a batch. answers_until: below so many positions any may. positions: whether it takes
    positions from us, or counts on its own. learned: how many positions it has; None: no such
    limit. decoder: whether is_decoder: true would make it causal.
    lengths: name -> (in the config, in the copy). copied: why there is no copy, and nothing is
    proven.
    """

    model_type: str
    causal: str | None = None
    padded: str | None = None
    packed: str | None = None
    differs: bool = False
    windows: bool = False
    answers: Batched = "any"
    answers_until: int | None = None
    positions: bool = True
    learned: int | None = None
    decoder: bool = False
    lengths: dict[str, tuple[int, int]] = field(default_factory=dict)
    copied: str | None = None

    def describe(self) -> str:
        """What was proven, for the run's events."""
        if self.copied is not None:
            return f"none: no small copy can be made ({self.copied})"
        shared = {"any": "of any lengths", "length": "of one length", "one": "one at a time"}
        said = f"prompts {shared[self.answers]} are answered together"
        if self.answers != "any" and self.answers_until:
            said += f" beyond {self.answers_until} positions"
        if self.learned is not None:
            said += f"; {self.learned} positions"
        scaled = [f"{name} {was} as {now}" for name, (was, now) in self.lengths.items()]
        return f"{said}; on a small copy" + (f" with {', '.join(scaled)}" if scaled else "")
