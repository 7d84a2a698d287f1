"""qlora: the language model's weights in 4 bits (NF4, arXiv:2305.14314), through bitsandbytes.

Audio tower, projector, embeddings and head stay as they are, and so do fused experts. Works on the
CPU too, slowly. Costs 0.52 bytes a quantised weight.
"""

from __future__ import annotations

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from raysft.config.schema import Config
from raysft.data.encode import model_family
from raysft.errors import UserError
from raysft.parallel.native import HALF

# Parts beside the language model that transformers would quantise as well; and heads, which it
# leaves alone unless it is told of something else.
UNQUANTISED = ["lm_head", "audio_tower", "multi_modal_projector"]


def nf4(config: Config) -> BitsAndBytesConfig:
    """How transformers is to load the base; products are computed in `train.precision`.

    Raises UserError where bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("peft.method: qlora needs bitsandbytes: pip install 'raysft[quant]'")
    audio = model_family(config.model) == "audio_lm"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=HALF.get(config.train.precision, torch.float32),
        llm_int8_skip_modules=UNQUANTISED if audio else None,
    )
