"""Every model type of audio_lm in small: configs, extractors, tokens. `audio_zoo` makes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

RATE = 16000
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Wide, so that small models answer differently at every position and errors show.
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 257,
}
WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "initializer_range": 0.2,
}
VISION: dict[str, Any] = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
OMNI = {
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
}
TURNS = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' -}}"
    "{%- if m['content'] is string -%}{{- m['content'] -}}{%- else -%}"
    "{%- for part in m['content'] -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- else -%}{{- 'AUDIO' -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Tiny:
    """A model type in small. shown: how its chat template writes a clip, around {}.

    config: without the ids of its tokens. extractor: class, and arguments. ids: key of the config
    (`.` for those within) -> token. whole: what its checkpoint holds beside the thinker.
    """

    config: dict[str, Any]
    extractor: tuple[str, dict[str, Any]]
    tokens: dict[str, str]
    ids: dict[str, str]
    processor: str
    shown: str = "{}"
    settings: dict[str, Any] = field(default_factory=dict)
    audio_key: str = "audio_token"


def _whisper(**more: Any) -> tuple[str, dict[str, Any]]:
    return "WhisperFeatureExtractor", {"feature_size": 16, "chunk_length": 2, **more}


_QWEN3_AUDIO = {**WHISPER, "downsample_hidden_size": 8, "output_dim": 32, "n_window": 50}

TINY: dict[str, Tiny] = {
    "qwen3_asr": Tiny(
        config={
            "model_type": "qwen3_asr",
            "audio_config": {**_QWEN3_AUDIO, "n_window_infer": 100},
            "text_config": {"model_type": "qwen3", "head_dim": 8, **TEXT},
        },
        extractor=("Qwen3ASRFeatureExtractor", {"feature_size": 16}),
        tokens={k: OMNI[k] for k in ("audio_token", "audio_bos_token", "audio_eos_token")},
        ids={"audio_token_id": "audio_token"},
        processor="Qwen3ASRProcessor",
        shown="<|audio_bos|>{}<|audio_eos|>",
    ),
    "glmasr": Tiny(
        config={
            "model_type": "glmasr",
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 100,
                "num_mel_bins": 16,
                "initializer_range": 0.2,
            },
            "text_config": {"model_type": "llama", **TEXT},
        },
        extractor=_whisper(),
        tokens={"audio_token": "<|pad|>"},
        ids={"audio_token_id": "audio_token"},
        processor="GlmAsrProcessor",
        settings={"max_audio_len": 10},
        shown="<|begin_of_audio|>{}<|end_of_audio|>",
    ),
    "audioflamingo3": Tiny(
        config={
            "model_type": "audioflamingo3",
            "audio_config": {**WHISPER, "max_source_positions": 100},
            "text_config": {"model_type": "qwen2", **TEXT},
        },
        extractor=_whisper(),
        tokens={"audio_token": "<sound>"},
        ids={"audio_token_id": "audio_token"},
        processor="AudioFlamingo3Processor",
        settings={"max_audio_len": 10},
    ),
    "musicflamingo": Tiny(
        config={
            "model_type": "musicflamingo",
            "audio_config": {
                "model_type": "audioflamingo3_encoder",
                **WHISPER,
                "max_source_positions": 100,
            },
            "text_config": {"model_type": "qwen2", **TEXT},
        },
        extractor=_whisper(),
        tokens={"a": "<sound>", "b": "<|sound_bos|>", "c": "<|sound_eos|>"},
        ids={"audio_token_id": "a", "audio_bos_token_id": "b", "audio_eos_token_id": "c"},
        processor="MusicFlamingoProcessor",
        settings={"max_audio_len": 10},
        audio_key="a",
    ),
    "qwen2_5_omni_thinker": Tiny(
        config={
            "model_type": "qwen2_5_omni_thinker",
            "audio_config": {
                **WHISPER,
                "max_source_positions": 100,
                "n_window": 30,
                "output_dim": 32,
            },
            "vision_config": {**VISION, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
            "text_config": {
                **TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 2],
                },
            },
        },
        extractor=_whisper(),
        tokens=OMNI,
        ids={
            "audio_token_index": "audio_token",
            "audio_start_token_id": "audio_bos_token",
            "audio_end_token_id": "audio_eos_token",
            "vision_start_token_id": "vision_bos_token",
            "image_token_index": "image_token",
            "video_token_index": "video_token",
        },
        processor="Qwen2_5OmniProcessor",
        shown="<|audio_bos|>{}<|audio_eos|>",
    ),
    "qwen3_omni_moe_thinker": Tiny(
        config={
            "model_type": "qwen3_omni_moe_thinker",
            "audio_config": {**_QWEN3_AUDIO, "max_source_positions": 100, "n_window_infer": 100},
            "vision_config": {
                **VISION,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            "text_config": {
                **TEXT,
                "head_dim": 8,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 1, 1],
                    "mrope_interleaved": True,
                },
            },
        },
        extractor=_whisper(),
        tokens=OMNI,
        ids={
            "audio_token_id": "audio_token",
            "audio_start_token_id": "audio_bos_token",
            "vision_start_token_id": "vision_bos_token",
            "image_token_id": "image_token",
            "video_token_id": "video_token",
        },
        processor="Qwen3OmniMoeProcessor",
        shown="<|audio_bos|>{}<|audio_eos|>",
    ),
    "granite_speech": Tiny(
        config={
            "model_type": "granite_speech",
            "encoder_config": {
                "model_type": "granite_speech_encoder",
                "input_dim": 160,
                "num_layers": 2,
                "hidden_dim": 32,
                "feedforward_mult": 2,
                "num_heads": 4,
                "dim_head": 8,
                "output_dim": 12,
                "context_size": 20,
                "max_pos_emb": 32,
                "dropout": 0.0,
                "conv_kernel_size": 5,
                "conv_expansion_factor": 2,
            },
            "projector_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 32,
                "encoder_hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            "text_config": {"model_type": "granite", **TEXT},
            "has_lora_adapter": False,
        },
        extractor=("GraniteSpeechFeatureExtractor", {}),
        tokens={"audio_token": "<|audio|>"},
        ids={"audio_token_id": "audio_token"},
        processor="GraniteSpeechProcessor",
    ),
    "phi4_multimodal": Tiny(
        config={
            "model_type": "phi4_multimodal",
            **{key: value for key, value in TEXT.items() if key != "pad_token_id"},
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            },
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 2,
                "num_attention_heads": 4,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "nemo_conv_channels": 16,
                "input_size": 80,
                "bias_max_distance": 20,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
        },
        extractor=("Phi4MultimodalFeatureExtractor", {}),
        tokens={"audio_token": "<|audio|>", "image_token": "<|image|>"},
        ids={
            "audio_config.audio_token_id": "audio_token",
            "vision_config.image_token_id": "image_token",
        },
        processor="Phi4MultimodalProcessor",
    ),
    "gemma4": Tiny(
        config={
            "model_type": "gemma4",
            "audio_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "subsampling_conv_channels": [128, 4],
                "output_proj_dims": 32,
            },
            "text_config": {
                **TEXT,
                "head_dim": 8,
                "global_head_dim": 8,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 300,
                "pad_token_id": 0,
            },
        },
        extractor=("Gemma4AudioFeatureExtractor", {}),
        tokens={
            "audio_token": "<audio_soft_token>",
            "image_token": "<image_soft_token>",
            "boi_token": "<boi>",
            "eoi_token": "<eoi>",
            "video_token": "<|video|>",
        },
        ids={"audio_token_id": "audio_token", "image_token_id": "image_token"}
        | {"video_token_id": "video_token", "boi_token_id": "boi_token"},
        processor="Gemma4Processor",
    ),
    "gemma3n": Tiny(
        config={
            "model_type": "gemma3n",
            "audio_config": {
                "hidden_size": 32,
                "vocab_size": 2,
                "vocab_offset": 265,
                "conf_num_hidden_layers": 2,
                "conf_num_attention_heads": 4,
                "sscp_conv_channel_size": [8, 4],
            },
            "vision_config": {
                "architecture": "test_resnet",
                "hidden_size": 32,
                "vocab_size": 1,
                "vocab_offset": 264,
            },
            "text_config": {
                **TEXT,
                "head_dim": 8,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 264,
                "laurel_rank": 4,
                "altup_num_inputs": 2,
                "num_kv_shared_layers": 0,
                "activation_sparsity_pattern": [0.5, 0.0],
                "pad_token_id": 0,
            },
            "audio_soft_tokens_per_image": 24,
        },
        extractor=("Gemma3nAudioFeatureExtractor", {}),
        tokens={
            "audio_token": "<audio_soft_token>",
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "boa_token": "<start_of_audio>",
            "eoa_token": "<end_of_audio>",
        },
        ids={"audio_token_id": "audio_token", "image_token_id": "image_token"}
        | {"boi_token_id": "boi_token", "eoi_token_id": "eoi_token"}
        | {"boa_token_id": "boa_token", "eoa_token_id": "eoa_token"},
        processor="Gemma3nProcessor",
        settings={"audio_seq_length": 24},
    ),
    "fun_asr_nano": Tiny(
        config={
            "model_type": "fun_asr_nano",
            "audio_config": {
                "model_type": "fun_asr_nano_encoder",
                "num_mel_bins": 16,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
                "num_timestamp_prediction_layers": 1,
            },
            "adaptor_config": {
                "hidden_size": 32,
                "num_attention_heads": 4,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "projector_hidden_size": 48,
            },
            "text_config": {"model_type": "qwen3", "head_dim": 8, **TEXT},
        },
        extractor=("FunAsrNanoFeatureExtractor", {"feature_size": 16}),
        tokens={"audio_token": "<|object_ref_start|>"},
        ids={"audio_token_id": "audio_token"},
        processor="FunAsrNanoProcessor",
    ),
    "voxtral": Tiny(
        config={
            "model_type": "voxtral",
            "audio_config": {
                "model_type": "voxtral_encoder",
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_mel_bins": 16,
                "max_source_positions": 100,
                "initializer_range": 0.2,
            },
            "text_config": {"model_type": "llama", "head_dim": 8, **TEXT},
        },
        extractor=_whisper(),
        tokens={"audio_token": "[AUDIO]"},
        ids={"audio_token_id": "audio_token"},
        processor="VoxtralProcessor",
    ),
}

TINY["granite_speech_plus"] = replace(
    TINY["granite_speech"],
    config={
        **TINY["granite_speech"].config,
        "model_type": "granite_speech_plus",
        "encoder_config": {
            **TINY["granite_speech"].config["encoder_config"],
            "model_type": "granite_speech_plus_encoder",
            "cat_hidden_layers": [1],
        },
        "projector_config": {
            **TINY["granite_speech"].config["projector_config"],
            "encoder_hidden_size": 64,
        },
    },
)

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
"""What a whole checkpoint holds beside its thinker: kind -> parts of its config."""

MODES: dict[str, str] = {}
"""data.mode of the kinds whose packed rows are not exact."""
