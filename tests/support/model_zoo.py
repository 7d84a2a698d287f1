"""Tiny models and micro-batches of random tokens, for the tests of models and export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from raysft.config import schema
from raysft.data.encode import make_encoder
from raysft.data.example import MicroBatch, Sequence
from raysft.families.audio_lm.encode import FEATURES
from raysft.losses import Term
from raysft.models import SpeechModel, build
from raysft.models.layout import Batch

torch.set_num_threads(2)

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Wide, so that small models answer differently at every position and errors show.
    "initializer_range": 0.2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, **SMALL},
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True, **SMALL},
    "qwen3_sliding": {
        "model_type": "qwen3",
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        **SMALL,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        **SMALL,
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        **SMALL,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "qwen2_audio": {
        "model_type": "qwen2_audio",
        "text_config": {"model_type": "qwen2", **SMALL},
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 50,
            "initializer_range": 0.2,
        },
    },
}


def settings(name: str, **changes: Any) -> schema.Model:
    """The `model` section of CONFIGS[name], with `changes` to its config."""
    audio = {"feature_extractor": {"chunk_length": 1}} if name == "qwen2_audio" else {}
    return schema.Model(config={**CONFIGS[name], **changes}, tokenizer="bytes", **audio)


def make(name: str, mode: str = "packed", seed: int = 0, **changes: Any) -> SpeechModel:
    """The adapter of CONFIGS[name], with `changes` to its config."""
    model, data = settings(name, **changes), schema.Data(mode=mode)
    return build(model, data, make_encoder(model, data, "unused"), seed)


def sequences(
    adapter: SpeechModel, lengths: list[int], seed: int = 0, mels: int = 8
) -> list[Sequence]:
    """Random sequences; with audio where the model hears; about half the tokens supervised."""
    rng = np.random.default_rng(seed)
    audio_token = getattr(adapter, "audio_token_id", None)
    made = []
    for i, length in enumerate(lengths):
        ids = rng.integers(0, 256, length).astype(np.int32)
        labels = np.where(rng.random(length) < 0.5, ids, -100).astype(np.int32)
        arrays: dict[str, list[np.ndarray]] = {}
        if audio_token is not None:
            tokens = 2 + i % 3
            ids = np.concatenate([np.full(tokens, audio_token, np.int32), ids])
            labels = np.concatenate([np.full(tokens, -100, np.int32), labels])
            frames = 4 * tokens - 1 + adapter.front_end.tail
            arrays = {FEATURES: [rng.standard_normal((frames, mels)).astype(np.float32)]}
        made.append(Sequence(f"s{i}", ("asr", "tts")[i % 2], ids, labels, arrays))
    return made


def batch_of(*items: Sequence) -> MicroBatch:
    """A micro-batch of the sequences given."""
    return MicroBatch.join(0, 1, 0, list(items))


class Loss(NamedTuple):
    """The terms of a micro-batch as one. sum: of what is trained."""

    sum: torch.Tensor
    count: torch.Tensor
    by_task: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    terms: list[Term]


def loss_of(adapter: SpeechModel, batch: Batch) -> Loss:
    """By the bare module, each sum as if its count were 1."""
    terms = adapter.loss(batch)
    trained = [term.weight * term.trained for term in terms if term.trained is not None]
    return Loss(sum(trained[1:], trained[0]), terms[0].count, terms[0].by_task, terms)


def gradients(adapter: SpeechModel) -> dict[str, torch.Tensor]:
    """The gradient of every trained parameter; asserts that none is missing. Clears them."""
    found = {}
    for name, parameter in adapter.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = parameter.grad.clone()
            parameter.grad = None
    return found


def clip_inputs(adapter: SpeechModel, clip: np.ndarray) -> dict[str, torch.Tensor]:
    """What the model takes of one clip's features [frames + tail, mels]."""
    mask = torch.zeros(1, adapter.frames_limit, dtype=torch.long)
    mask[0, : len(clip) - adapter.front_end.tail] = 1
    padded = adapter.front_end.pad(clip, adapter.frames_limit)
    return {"input_features": torch.tensor(padded.T[None]), "feature_attention_mask": mask}


def plain_loss(adapter: SpeechModel, item: Sequence) -> torch.Tensor:
    """The reference: transformers alone on one sequence, by its own sdpa, its own encoder and its
    own loss."""
    net = adapter.model
    tower = getattr(adapter.net.model, "audio_tower", None)
    ours = None if tower is None else vars(tower).pop("forward")
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor(item.input_ids[None].astype(np.int64)),
        "labels": torch.tensor(item.labels[None].astype(np.int64)),
    }
    if item.arrays:
        inputs |= clip_inputs(adapter, item.arrays[FEATURES][0])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    text = net.config.get_text_config()
    used = text._attn_implementation
    text._attn_implementation = "sdpa"
    loss = net(**inputs, use_cache=False).loss
    text._attn_implementation = used
    if tower is not None:
        vars(tower)["forward"] = ours
    return loss * int((item.labels[1:] != -100).sum())


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference over the largest value of `b`, of one parameter."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-3)).item() for k in a)
