"""What a step learns beside right answers: the sections `train.grpo` and `train.dpo`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from raysft.config import rewards as earned
from raysft.config.marks import Fixed, OneOf, Stepwise
from raysft.config.section import Section

Objective = Literal["sft", "grpo", "dpo"]


class Grpo(Section):
    """How answers are sampled, rewarded and learnt from (train.objective: grpo)."""

    group: Fixed[PositiveInt] = Field(8, description="answers to each prompt, at least 2")
    rewards: Fixed[dict[Annotated[str, OneOf(earned.choices)], float]] = Field(
        default_factory=lambda: {"accuracy": 1.0, "format": 1.0},
        description="what an answer earns, each times its weight, e.g. {rating: 1.0, format: 0.5}",
    )
    max_new_tokens: Fixed[PositiveInt] = Field(256, description="longest answer sampled")
    temperature: Stepwise[PositiveFloat] = Field(
        1.0, description="of sampling; the policy that is learnt is that at this temperature"
    )
    top_p: Stepwise[float] = Field(
        1.0, gt=0, le=1, description="sampled of the likeliest tokens with this share"
    )
    beta: Fixed[NonNegativeFloat] = Field(
        0.04,
        description="weight of the KL from the reference, which is the model as the run began; "
        "0: there is none",
    )
    clip: Stepwise[float] = Field(
        0.2, gt=0, lt=1, description="how far below 1 (and above) the ratio to the sampler counts"
    )
    clip_high: Stepwise[PositiveFloat | None] = Field(
        None, description="how far above 1, where it is another (DAPO: 0.28)"
    )
    updates: Fixed[PositiveInt] = Field(
        1, description="steps of the optimizer that are made of each sampling"
    )
    loss: Fixed[Literal["grpo", "dr_grpo", "dapo"]] = Field(
        "grpo",
        description="what the sum over tokens is divided by; grpo: by each answer's tokens, then "
        "by answers; dr_grpo: by answers times max_new_tokens; dapo: by the tokens of all answers",
    )
    scale: Fixed[bool] = Field(
        True, description="divide advantages by the deviation of their group (Dr. GRPO: false)"
    )
    drop_equal: Fixed[bool] = Field(
        False, description="leave out groups whose answers all earn the same (DAPO: true)"
    )
    tokens_per_batch: Fixed[PositiveInt | None] = Field(
        None,
        description="positions, of prompts and longest answers, sampled together; default: "
        "data.tokens_per_batch",
    )

    @property
    def high(self) -> float:
        """How far above 1 the ratio counts."""
        return self.clip if self.clip_high is None else self.clip_high


class Dpo(Section):
    """How pairs of a chosen and a rejected answer are learnt (train.objective: dpo)."""

    beta: Stepwise[PositiveFloat] = Field(
        0.1, description="how strongly the model is held to the reference, itself as the run began"
    )
    loss: Fixed[Literal["sigmoid", "ipo"]] = Field(
        "sigmoid",
        description="of a pair; ipo: of mean log-probabilities, which does not drive pairs apart "
        "without end",
    )
    label_smoothing: Stepwise[float] = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of pairs that are taken to be labelled the wrong way round (sigmoid)",
    )
    sft_weight: Fixed[NonNegativeFloat] = Field(
        0.0,
        description="weight of the chosen answers' cross-entropy beside it, a mean over tokens, "
        "then over pairs",
    )
