"""Tiny mixtures of experts of the model types that are named in what is promised."""

from __future__ import annotations

from typing import Any

EXPERTS, TOP_K, VOCABULARY = 8, 3, 64
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_LATENT: dict[str, Any] = {  # DeepSeek's attention, and a first layer that is dense
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_EXPERTS_ALONE = {name: size for name, size in _SIZES.items() if name != "moe_intermediate_size"}

MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_SIZES, **_LATENT, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_SIZES, **_LATENT, "n_group": 4, "topk_group": 2},
    "qwen2_moe": {**_SIZES, "num_experts": EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_SIZES, "num_experts": EXPERTS, "head_dim": 16},
    "mixtral": {**_EXPERTS_ALONE, "num_local_experts": EXPERTS},
    "olmoe": {**_EXPERTS_ALONE, "num_experts": EXPERTS},
}
