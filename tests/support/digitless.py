"""A tokenizer in which a digit is no token of its own: that of bytes, with merges of 4 and what
stands behind it in answers."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from raysft.data.tokenizer import byte_tokenizer

MERGED = "<["


def saved(folder: Path) -> Path:
    """It, in a folder below this one."""
    plain = byte_tokenizer()
    tree = json.loads(plain.backend_tokenizer.to_str())
    for number, behind in enumerate(MERGED):
        tree["model"]["vocab"][f"4{behind}"] = 256 + number
        tree["model"]["merges"].append(["4", behind])
    for token in tree["added_tokens"]:  # these come last
        token["id"] += len(MERGED)
    made = Tokenizer.from_str(json.dumps(tree))
    names = plain.special_tokens_map
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"
