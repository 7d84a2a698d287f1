"""What somebody has beside raysft: a type of model that hears, and a family of models.

The family is in this one module, which is its encoder module and its model module.
"""

from __future__ import annotations

from pathlib import Path

from transformers import (
    BitsAndBytesConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
)

from raysft.config.families import Family
from raysft.config.schema import Data, Model
from raysft.data.encode import Encoder, net_class
from raysft.families.causal_lm.encode import CausalLMEncoder
from raysft.families.causal_lm.model import CausalLM
from raysft.models import loading

HEARING = "outside_audio"


class OutsideAudioConfig(Qwen2AudioConfig):
    """Of a model that is Qwen2-Audio by another name."""

    model_type = HEARING


class OutsideAudio(Qwen2AudioForConditionalGeneration):
    """Its class."""

    config_class = OutsideAudioConfig


HEARING_FAMILY = Family(
    name="outside_audio_lm",
    encode="raysft.families.audio_lm.encode",
    model="raysft.families.audio_lm.model",
    types={HEARING: "tests.support.outside:OutsideAudio"},
    hears=True,
    parts=("audio_tower", "multi_modal_projector"),
    refused_methods={"prefix": "its attention takes none"},
)
TEXT_FAMILY = Family(
    name="outside_lm",
    encode="tests.support.outside",
    model="tests.support.outside",
    every_causal_lm=True,
    refused_keys={"data.unit_noise": "outside_lm has its own noise"},
)


class OutsideEncoder(CausalLMEncoder):
    """Encodes as causal_lm does."""


class OutsideLM(CausalLM):
    """Is trained as causal_lm is."""


def make_encoder(model: Model, data: Data, run_folder: Path, kept: str | None) -> OutsideEncoder:
    """See `raysft.data.encode.Encode`."""
    return OutsideEncoder(model, data, None, kept)


def make_model(
    model: Model,
    data: Data,
    encoder: Encoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> OutsideLM:
    """See `raysft.models.Build`."""
    assert model.config is not None
    settings = loading.fill_from_tokenizer(model.config, encoder.tokenizer)
    net = loading.from_config(settings, net_class(model), seed)
    return OutsideLM(net, encoder.tokenizer, data.mode, [encoder.end_id])
