"""causal_lm: any AutoModelForCausalLM; text and speech units are tokens alike.

Stands between config and step. See `base` for what a batch holds and costs.
"""

from __future__ import annotations

import numpy as np
from transformers import BitsAndBytesConfig

from raysft.config import schema
from raysft.data.encode import Encoder, net_class
from raysft.models import loading
from raysft.models.base import IGNORED, Document, SpeechModel


class CausalLM(SpeechModel):
    """Tokens in, tokens out."""

    def dummy_document(self) -> Document:
        """Two end tokens."""
        ids = np.full(2, self.stop_ids[0], np.int32)
        return Document(ids, np.full(2, IGNORED, np.int32), "none")


def make_model(
    model: schema.Model,
    data: schema.Data,
    encoder: Encoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> CausalLM:
    """The model of `model`, with an embedding for every token of the encoder's tokenizer."""
    auto, tokenizer = net_class(model), encoder.tokenizer
    if model.config is not None:
        settings = loading.fill_from_tokenizer(model.config, tokenizer)
        net = loading.from_config(settings, auto, seed)
    else:
        net = loading.from_path(model, auto, quantization)
        loading.grow_vocabulary(net, len(tokenizer), seed)
    return CausalLM(net, tokenizer, data.mode, [encoder.end_id])
