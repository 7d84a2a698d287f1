"""Models of seq2seq that read a clip at its own length: tiny ones, and their tokenizers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from raysft.data.tokenizer import byte_tokenizer

PROMPT = (
    *("<|startofcontext|>", "<|startoftranscript|>", "<|emo:undefined|>", "<|pnc|>", "<|nopnc|>"),
    *("<|noitn|>", "<|notimestamp|>", "<|nodiarize|>"),
)
LANGUAGES = ("en", "de", "fr")
WIDE = {"initializer_range": 0.2}  # so that errors show
PARAKEET: dict[str, Any] = {
    "model_type": "parakeet_encoder",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_kernel_size": 5,
    "subsampling_conv_channels": 4,
    "num_mel_bins": 16,
    "scale_input": False,
    "layerdrop": 0.0,
    **WIDE,
}
DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    **WIDE,
}


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a type. config: its settings. tokens: of its tokenizer, beside bytes. told:
    whether it is told language and task. most: seconds of a clip that it reads at most."""

    config: dict[str, Any]
    tokens: tuple[str, ...] = ()
    told: bool = True
    extractor: dict[str, Any] = field(default_factory=dict)
    most: float | None = None


TINY = {
    "moonshine": Tiny(
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 2,
            "decoder_num_attention_heads": 2,
            **WIDE,
        },
        told=False,
    ),
    "cohere_asr": Tiny(
        {"encoder_config": {**PARAKEET, "hidden_size": 24}, **DECODER},
        ("\u2581", *PROMPT),
        extractor={"max_audio_clip_s": 2.0},
        most=2.0,
    ),
    "canary": Tiny(
        {
            "encoder_config": {**PARAKEET, "max_position_embeddings": 25},
            "decoder_config": {**DECODER, "num_key_value_heads": 2, "head_dim": 16},
        },
        PROMPT,
        most=2.0,
    ),
}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """256 bytes (id = byte), begin, end and padding, and the type's tokens."""
    made = byte_tokenizer()
    names = [*TINY[kind].tokens]
    if TINY[kind].told:
        names += [f"<|{code}|>" for code in LANGUAGES]
    made.add_tokens(names, special_tokens=True)
    return made


def model(kind: str, folder: Path, **config: Any) -> dict[str, Any]:
    """The `model` section of a tiny model of `kind`, its tokenizer written into `folder`."""
    place = folder / f"{kind}_tokenizer"
    if not place.exists():
        tokenizer(kind).save_pretrained(place)
    return {
        "tokenizer": str(place),
        "feature_extractor": dict(TINY[kind].extractor),
        "config": {"model_type": kind, **copy.deepcopy(TINY[kind].config), **config},
    }
