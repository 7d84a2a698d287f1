"""A Whisper of a few thousand weights, and a tokenizer of Whisper's class: bytes and its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, WhisperTokenizer

from raysft.data.text import byte_tokenizer

# In transformers' order of languages, as far as they go: its prefix tokens are found by counting.
LANGUAGES = ("<|en|>", "<|zh|>", "<|de|>")
TOKENS = (
    *("<|startoftranscript|>", *LANGUAGES, "<|translate|>", "<|transcribe|>"),
    *("<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>", "<|0.00|>"),
)
SMALL: dict[str, Any] = {
    "model_type": "whisper",
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 100,
    "max_target_positions": 64,
    "init_std": 0.2,  # wide, so that errors show
}


def tokenizer(languages: tuple[str, ...] = LANGUAGES) -> PreTrainedTokenizerBase:
    """256 bytes (id = byte), `<|endoftext|>`, `<|pad|>` and Whisper's tokens."""
    vocabulary = {token: i for token, i in byte_tokenizer().get_vocab().items() if i < 256}
    made = WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|pad|>")
    names = [name for name in TOKENS if name not in LANGUAGES or name in languages]
    made.add_tokens(names, special_tokens=True)
    made.set_prefix_tokens()  # which are known only now
    return made


def model(folder: Path, languages: tuple[str, ...] = LANGUAGES, **config: Any) -> dict[str, Any]:
    """The `model` section of a tiny Whisper that reads 2 s, its tokenizer written into `folder`."""
    place = folder / "whisper_tokenizer"
    if not place.exists():
        tokenizer(languages).save_pretrained(place)
    return {
        "tokenizer": str(place),
        "feature_extractor": {"chunk_length": 2},
        "config": {**SMALL, **config},
    }
