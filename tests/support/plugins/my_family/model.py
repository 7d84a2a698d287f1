"""The models of my_family."""

from __future__ import annotations

from transformers import BitsAndBytesConfig

from raysft.config.schema import Data, Model
from raysft.data.encode import Encoder, net_class
from raysft.families.causal_lm.model import CausalLM
from raysft.models import loading


class MyModel(CausalLM):
    """Is trained as causal_lm is."""


def make_model(
    model: Model,
    data: Data,
    encoder: Encoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> MyModel:
    """See `raysft.models.Build`."""
    assert model.config is not None
    settings = loading.fill_from_tokenizer(model.config, encoder.tokenizer)
    net = loading.from_config(settings, net_class(model), seed)
    return MyModel(net, encoder.tokenizer, data.mode, [encoder.end_id])
