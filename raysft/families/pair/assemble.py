"""A pair of two folders: what a joint training begins with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from raysft.errors import UserError, first_line
from raysft.families.flow_decoder.net import FlowDecoder
from raysft.families.pair.config import PairConfig
from raysft.families.pair.net import PairForCausalLM
from raysft.json_types import JsonObject

MADE = "pair.json"  # in the folder: what it was made of


def assemble(pair: JsonObject, folder: Path) -> None:
    """Write the pair of two models, with the tokenizer of the language model, into `folder`, which
    is there and empty. float32.

    pair: {"llm": folder or hub id, "flow": likewise, and, where they are not PairConfig's,
    "llm_weight", "flow_weight"}. Raises UserError where one of them cannot be loaded.
    """
    try:
        llm = AutoModelForCausalLM.from_pretrained(pair["llm"], dtype=torch.float32)
        flow = AutoModel.from_pretrained(pair["flow"], dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(pair["llm"])
    except (OSError, ValueError) as error:
        raise UserError(f"model.pair: {first_line(error)}") from error
    if not isinstance(flow, FlowDecoder):
        raise UserError(
            f"model.pair.flow: {pair['flow']} is a {type(flow).__name__}, no flow decoder"
        )
    weights = {key: pair[key] for key in ("llm_weight", "flow_weight") if key in pair}
    config = PairConfig(text_config=llm.config, flow_config=flow.config, **weights)
    net = PairForCausalLM(config, llm, flow)
    if llm.generation_config is not None:
        net.generation_config = llm.generation_config
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / MADE).write_text(json.dumps(pair), encoding="utf-8")


def made_of(folder: Path) -> JsonObject | None:
    """What the pair in `folder` was assembled of; None where it was not."""
    path = folder / MADE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
