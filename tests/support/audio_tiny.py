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


_GEMMA4: dict[str, Any] = {
    **TEXT,
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
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
                **_GEMMA4,
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
    "gemma4_unified": Tiny(
        config={
            "model_type": "gemma4_unified",
            "audio_config": {"audio_embed_dim": 640},
            "vision_config": {
                "patch_size": 2,
                "mm_embed_dim": 8,
                "mm_posemb_size": 4,
                "output_proj_dims": 8,
            },
            "text_config": {
                **_GEMMA4,
                "pad_token_id": 0,
            },
        },
        extractor=("Gemma4UnifiedAudioFeatureExtractor", {}),
        tokens={
            "audio_token": "<audio_soft_token>",
            "image_token": "<image_soft_token>",
            "boi_token": "<boi>",
            "eoi_token": "<eoi>",
            "boa_token": "<boa>",
            "eoa_token": "<eoa>",
            "video_token": "<|video|>",
        },
        ids={"audio_token_id": "audio_token", "image_token_id": "image_token"}
        | {"video_token_id": "video_token", "boi_token_id": "boi_token"},
        processor="Gemma4UnifiedProcessor",
    ),
    "moss_transcribe_diarize": Tiny(
        config={
            "model_type": "moss_transcribe_diarize",
            "audio_config": {**WHISPER, "max_source_positions": 100},
            "text_config": {"model_type": "qwen3", "head_dim": 8, **TEXT},
            "audio_chunk_size": 32000,
        },
        extractor=(
            "MossTranscribeDiarizeFeatureExtractor",
            {"feature_size": 16, "chunk_length": 2},
        ),
        tokens={
            "audio_token": "<|audio_pad|>",
            "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>",
        },
        ids={"audio_token_id": "audio_token"},
        processor="MossTranscribeDiarizeProcessor",
        shown="<|audio_start|>{}<|audio_end|>",
        settings={"time_marker_every_seconds": 1},
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

MODES: dict[str, str] = {}
"""data.mode of the kinds whose packed rows are not exact."""
