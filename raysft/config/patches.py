"""The section of the config that says what patches of speech are: `model.patches`, of patch_lm."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from raysft.config.marks import Fixed, PathKey, Weights
from raysft.config.mel import Mel
from raysft.config.section import Section


class Codec(Section):
    """The codec whose latents, before they are quantised, are patches."""

    path: Weights[Annotated[str, PathKey("model", read=True)]] = Field(
        description="folder or hub id of a codec of transformers: VibeVoice's acoustic tokenizer, "
        "DAC or EnCodec"
    )
    rate: Weights[PositiveInt | None] = Field(
        None, description="Hz of clips; default: as the codec says"
    )
    width: Weights[PositiveInt | None] = Field(
        None, description="values of a frame; default: as the codec says"
    )
    mean: Weights[float] = Field(0.0, description="taken off each value")
    std: Weights[PositiveFloat] = Field(1.0, description="that each value is then divided by")


class Column(Section):
    """Latents that the data brings: a column of Parquet, `columns: {latents: NAME}`."""

    rate: Weights[PositiveFloat] = Field(description="frames a second")
    width: Weights[PositiveInt] = Field(description="values of a frame")
    mean: Weights[float] = Field(0.0, description="taken off each value")
    std: Weights[PositiveFloat] = Field(1.0, description="that each value is then divided by")


class Patches(Section):
    """How speech is cut into patches, and the heads that speak them."""

    mel: Weights[Mel | None] = Field(None, description="what frames are: log-mel of which kind")
    codec: Weights[Codec | None] = Field(
        None, description="what frames are, instead: latents of a codec"
    )
    column: Weights[Column | None] = Field(
        None,
        description="what frames are, instead: latents in a column of the data; with `codec`, that "
        "makes waves of them",
    )
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
