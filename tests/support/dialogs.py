"""Tokenizers as USDM's model and others have them, and dialogs of speech for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.models import CAUSAL

UNITS = 12
MARKERS = ["<|continue|>", "<|correspond|>"]


def mistral(folder: Path) -> Path:
    """As Mistral's: pieces with a bar for a blank, one before each stretch, bytes where there is
    no piece; the newline is a byte of its own behind a bar."""
    if (folder / "mistral").exists():
        return folder / "mistral"
    letters = [chr(code) for code in range(33, 127)]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    merges = [("▁", "h"), ("e", "l"), ("▁h", "el"), ("l", "o"), ("▁hel", "lo"), ("▁", "a")]
    names += ["".join(pair) for pair in merges]
    vocabulary = {name: number for number, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _kept(made, {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, folder / "mistral")


def qwen(folder: Path) -> Path:
    """As Qwen's: bytes, of which a stop and the newline behind it are one piece; no begin token."""
    if (folder / "qwen").exists():
        return folder / "qwen"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(".", "Ċ"), ("Ċ", "Ċ")]
    names = [*alphabet, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return _kept(made, {"eos": "<|endoftext|>"}, folder / "qwen")


def _kept(made: Tokenizer, specials: dict[str, str], folder: Path) -> Path:
    made.add_special_tokens([AddedToken(name, normalized=False) for name in specials.values()])
    named = {f"{kind}_token": name for kind, name in specials.items()}
    PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder)
    return folder


def model(tokenizer: str | Path = "bytes", **more: Any) -> dict[str, Any]:
    """The `model` section of one that learns dialogs."""
    own = {"tokenizer": str(tokenizer), "speech_units": UNITS, "extra_tokens": MARKERS}
    return {**CAUSAL, **own, **more}


def turns(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Of two speakers in turn."""
    rng = np.random.default_rng(seed)
    return [
        {
            "speaker": "ab"[number % 2],
            "text": f"hello {number}",
            "units": rng.integers(0, UNITS, 4).tolist(),
        }
        for number in range(count)
    ]


def corpus(path: Path, dialogs: int = 8, length: int = 4) -> Path:
    """JSON lines of dialogs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"d{n}", "turns": turns(length, n)}) for n in range(dialogs)]
    path.write_text("\n".join(lines))
    return path
