"""qlora: the language model's weights in 4 bits (NF4, arXiv:2305.14314), through bitsandbytes.

Audio tower, projector, embeddings and head stay as they are, and so do fused experts. Works on the
CPU too, slowly. Costs 0.52 bytes a quantised weight.

On processors with AVX512-BF16 bitsandbytes lays weights out anew at the first pass that is not for
training: rounded scales, no way back, and no gradient any more, so that training after an
evaluation would be another. That is switched off here: what a run computes does not depend on the
processor. Others who load the base in 4 bits there, beside the trained adapter, cannot do without;
so widths that this layout has no room for are refused, on every machine.
"""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from raysft.config.families import Family
from raysft.config.schema import Config
from raysft.data.encode import model_family
from raysft.errors import UserError
from raysft.parallel.native import HALF

HEAD = "lm_head"  # which transformers leaves alone, unless it is told of something else to leave
# What the packed layout takes: inputs in NF4's blocks, outputs in the rows of a product.
INPUTS, OUTPUTS = 64, 32


def nf4(config: Config) -> BitsAndBytesConfig:
    """How transformers is to load the base; products are computed in `train.precision`.

    Raises UserError where bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("peft.method: qlora needs bitsandbytes: pip install 'raysft[quant]'")
    # It would say that a kernel from the hub, which nothing here uses, is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=HALF.get(config.train.precision, torch.float32),
        llm_int8_skip_modules=_skipped(model_family(config.model)),
    )


def unpacked(net: PreTrainedModel) -> None:
    """Keep the 4-bit layers of `net` in the one layout that every processor knows."""
    import bitsandbytes

    for module in net.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def refuse_widths(net: PreTrainedModel, family: Family) -> None:
    """Raises UserError where a layer of the plain model `net` (weights are not looked at) of
    `family` cannot be had in 4 bits on every processor."""
    left = _left_alone(net, family)
    for name, module in net.named_modules():
        linear = type(module) is nn.Linear or isinstance(module, Conv1D)
        if not linear or not should_convert_module(name, left):
            continue
        outputs, inputs = module.weight.shape
        if isinstance(module, Conv1D):
            outputs, inputs = inputs, outputs
        if inputs % INPUTS or outputs % OUTPUTS:
            raise UserError(
                f"peft.method: qlora: {name} is {inputs} wide and gives {outputs}; on some "
                f"processors bitsandbytes computes 4-bit layers only with inputs in multiples of "
                f"{INPUTS} and outputs in multiples of {OUTPUTS}; use peft.method: lora"
            )


def _left_alone(net: PreTrainedModel, family: Family) -> list[str]:
    """Patterns of the layers that transformers does not quantise."""
    skipped, kept = _skipped(family), net._keep_in_fp32_modules
    return Bnb4BitHfQuantizer.get_modules_to_not_convert(net, skipped, kept)


def _skipped(family: Family) -> list[str] | None:
    """Parts beside the language model, which transformers would quantise as well; None: it has
    none."""
    return [HEAD, *family.parts] if family.parts else None
