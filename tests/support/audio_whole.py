"""What checkpoints of the omnis hold beside their thinker, in small: kind -> parts of a config."""

from __future__ import annotations

from typing import Any

_TALKER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 1,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
WHOLE: dict[str, dict[str, Any]] = {
    "qwen2_5_omni": {
        "talker_config": {**_TALKER, "embedding_size": 32, "rope_parameters": _ROPE},
        "token2wav_config": {
            "dit_config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "head_dim": 16,
                "ff_mult": 1,
                "emb_dim": 16,
                "mel_dim": 8,
                "enc_dim": 16,
                "enc_emb_dim": 8,
                "enc_channels": [8, 8, 8, 8, 24],
                "enc_kernel_sizes": [3, 3, 3, 3, 1],
                "enc_dilations": [1, 1, 1, 1, 1],
                "enc_attention_channels": 8,
                "enc_res2net_scale": 2,
                "enc_se_channels": 8,
                "num_embeds": 32,
            },
            "bigvgan_config": {
                "mel_dim": 8,
                "upsample_initial_channel": 16,
                "resblock_kernel_sizes": [3],
                "resblock_dilation_sizes": [[1, 1, 1]],
                "upsample_rates": [2],
                "upsample_kernel_sizes": [4],
            },
        },
    },
    "qwen3_omni_moe": {
        "talker_config": {
            "thinker_hidden_size": 32,
            "num_code_groups": 4,
            "accept_hidden_layer": 1,
            "speaker_id": {"one": 1},
            "spatial_merge_size": 2,
            "text_config": {
                **_TALKER,
                "rope_parameters": {**_ROPE, "mrope_interleaved": True},
                "num_experts": 2,
                "num_experts_per_tok": 1,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
            },
            "code_predictor_config": {**_TALKER, "num_code_groups": 4},
        },
        "code2wav_config": {
            "codebook_size": 16,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_quantizers": 4,
            "upsample_rates": [2],
            "upsampling_ratios": [2],
            "decoder_dim": 16,
        },
    },
}
