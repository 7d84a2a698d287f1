"""Models of seq2seq that read a clip at its own length: tiny ones, and their tokenizers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from dataclasses import field as default
from pathlib import Path
from struct import pack
from typing import Any

from transformers import PreTrainedTokenizerFast

from raysft.data.tokenizer import byte_tokenizer
from raysft.families.seq2seq import sentencepiece

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
    extractor: dict[str, Any] = default(default_factory=dict)
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
    "speech_to_text": Tiny(
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "conv_channels": 48,
            "input_feat_per_channel": 16,
            "max_source_positions": 199,
            "max_target_positions": 64,
            "init_std": 0.2,
        },
        told=False,
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


def field(number: int, value: bytes | float | int) -> bytes:
    """A field of a message of protocol buffers, of less than 128 bytes."""
    if isinstance(value, bytes):
        return bytes([number << 3 | 2, len(value)]) + value
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + pack("<f", value)
    return bytes([number << 3, value])


def pieces(scores: dict[str, float], kind: int = 1, prefix: int = 1) -> bytes:
    """A model of sentencepiece, of its type `kind` (1: unigram), as sentencepiece writes it."""
    control = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    found = [field(1, field(1, t.encode()) + field(2, 0.0) + field(3, k)) for t, k in control]
    found += [field(1, field(1, t.encode()) + field(2, s)) for t, s in scores.items()]
    return b"".join(found) + field(2, field(3, kind)) + field(3, field(3, prefix))


# Characters, and some longer pieces that are likelier than what they are made of.
SCORES = {chr(code): -8.0 - code / 100 for code in range(33, 127)}
SCORES |= {"\u2581": -3.0, "\u00fc": -9.0, "er": -5.0, "\u2581one": -4.0, "ro": -5.5, "zer": -6.0}
IDS = {name: i for i, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *sorted(SCORES)])}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """256 bytes (id = byte), begin, end and padding, and the type's tokens; of Speech2Text one of
    its kind."""
    if kind == "speech_to_text":
        return sentencepiece.made(pieces(SCORES), IDS)
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
