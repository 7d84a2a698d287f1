"""Tiny codecs of transformers with random weights, as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

RATE = 16000
KINDS = ("vibevoice", "dac", "encodec")
WIDTH = {"vibevoice": 6, "dac": 16, "encodec": 6}
HOP = {"vibevoice": 160, "dac": 160, "encodec": 160}


def codec(folder: Path, kind: str, **more: Any) -> Path:
    """A codec of 100 frames a second, whose latents are about as wide as 1."""
    import transformers

    torch.manual_seed(0)
    if kind == "vibevoice":
        sizes = {"hidden_size": 6, "num_filters": 2, "ffn_expansion": 2, "initializer_range": 0.3}
        config = transformers.VibeVoiceAcousticTokenizerConfig(
            **{**sizes, "downsampling_ratios": [4, 5, 8], "depths": [1, 1, 1, 1], **more}
        )
        net = transformers.VibeVoiceAcousticTokenizerModel(config)
    elif kind == "dac":
        sizes = {"encoder_hidden_size": 2, "decoder_hidden_size": 16, "codebook_size": 16}
        config = transformers.DacConfig(
            **{**sizes, "downsampling_ratios": [4, 5, 8], "upsampling_ratios": [8, 5, 4]},
            **{"n_codebooks": 1, "codebook_dim": 2, "sampling_rate": RATE, **more},
        )
        net = transformers.DacModel(config)
    else:
        sizes = {"hidden_size": 6, "num_filters": 2, "codebook_size": 16, "num_lstm_layers": 1}
        config = transformers.EncodecConfig(
            **{**sizes, "upsampling_ratios": [8, 5, 4], "target_bandwidths": [0.4]},
            **{"sampling_rate": RATE, **more},
        )
        net = transformers.EncodecModel(config)
    place = folder / kind
    net.save_pretrained(place)
    if kind == "vibevoice":  # which alone does not say its rate
        told = {"sampling_rate": RATE, "normalize_audio": True, "target_dB_FS": -25, "eps": 1e-6}
        told["feature_extractor_type"] = "VibeVoiceAcousticTokenizerFeatureExtractor"
        (place / "preprocessor_config.json").write_text(json.dumps(told))
    return place
