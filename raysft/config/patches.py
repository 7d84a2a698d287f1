"""The section of the config that says what patches of speech are: `model.patches`, of patch_lm."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from raysft.config.marks import Fixed, Weights
from raysft.config.mel import Mel
from raysft.config.section import Section


class Patches(Section):
    """How speech is cut into patches, and the heads that speak them."""

    mel: Weights[Mel | None] = Field(None, description="what frames are: log-mel of which kind")
    size: Weights[PositiveInt] = Field(5, description="frames of a patch")
    width: Weights[PositiveInt] = Field(1024, description="of the flow head")
    depth: Weights[PositiveInt] = Field(28, description="layers of the flow head")
    heads: Weights[PositiveInt] = Field(16, description="attention heads of the flow head")
    mlp: Weights[PositiveFloat] = Field(4.0, description="inner width of its layers, times width")
    dropout: Weights[NonNegativeFloat] = Field(0.1, description="of the flow head", lt=1)
    condition_dropout: Fixed[NonNegativeFloat] = Field(
        0.1,
        description="share of patches that are learnt without their condition, for guidance",
        lt=1,
    )
    history_noise: Fixed[NonNegativeFloat] = Field(
        0.0,
        description="spread of the noise, in training, on what has been spoken before, so that "
        "the text is listened to and small faults are not carried on",
    )
    time_power: Fixed[PositiveInt] = Field(
        1,
        description="in training a patch is learnt at the time u ** time_power of its way, u "
        "uniform; above 1: more near the noise, where alone the text decides what will be said",
    )
    roles: Weights[list[str]] = Field(
        ["HUMAN", "ASSISTANT"],
        description="names of who asks and who answers",
        min_length=2,
        max_length=2,
    )
    text_weight: Fixed[NonNegativeFloat] = Field(1.0, description="of the text's loss")
    flow_weight: Fixed[NonNegativeFloat] = Field(1.0, description="of the flow head's loss")
    stop_weight: Fixed[NonNegativeFloat] = Field(0.01, description="of the stop head's loss")
