"""Tiny model sections for configs in tests: random weights, a second or less a step."""

from __future__ import annotations

from typing import Any

CAUSAL: dict[str, Any] = {
    "tokenizer": "bytes",
    "config": {
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
    },
}

AUDIO: dict[str, Any] = {
    "tokenizer": "bytes",
    "feature_extractor": {"feature_size": 80, "chunk_length": 3},
    "config": {
        "model_type": "qwen2_audio",
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "num_mel_bins": 80,
            "max_source_positions": 150,
            "dropout": 0.1,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "attention_dropout": 0.0,
        },
    },
}
