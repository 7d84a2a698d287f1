"""Batches are worth their documents alone, or are refused: windows, stretched positions, states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raysft.config import schema
from raysft.data.encode import make_encoder
from raysft.data.example import Sequence
from raysft.errors import UserError
from raysft.models import SpeechModel, build, copies, proof, rope
from raysft.models.loading import make_config
from raysft.models.meta import on_meta
from tests.support.model_zoo import SMALL, batch_of, loss_of

LONGROPE = {
    "model_type": "phi3",
    **SMALL,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "pad_token_id": 258,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    },
}
DYNAMIC = {
    "model_type": "llama",
    **SMALL,
    "max_position_embeddings": 16,
    "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
}
STRETCHED = {"longrope": LONGROPE, "dynamic": DYNAMIC}
MASKED = {
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **SMALL,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_sliding_window": True,
        "sliding_window": 10,
        "max_window_layers": 1,
    },
    "phimoe": {
        "model_type": "phimoe",
        **SMALL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 10,
    },
}
STATES = {
    "rwkv": {
        "model_type": "rwkv",
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
    },
    "recurrent_gemma": {
        "model_type": "recurrent_gemma",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "lru_width": 32,
        "attention_window_size": 10,
    },
}


def made(config: dict[str, Any], mode: str = "packed") -> SpeechModel:
    model, data = schema.Model(config=config, tokenizer="bytes"), schema.Data(mode=mode)
    adapter = build(model, data, make_encoder(model, data, "unused"), 0)
    with torch.no_grad():  # some begin at zero, and say the same everywhere
        generator = torch.Generator().manual_seed(1)
        for parameter in adapter.net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapter


def documents(lengths: list[int]) -> list[Sequence]:
    rng = np.random.default_rng(0)
    every = [rng.integers(0, 256, n).astype(np.int32) for n in lengths]
    return [Sequence(f"s{i}", "asr", ids, ids.copy()) for i, ids in enumerate(every)]


def alone(adapter: SpeechModel, item: Sequence) -> float:
    """The summed loss of one document by transformers, in a model of its own that has seen none."""
    net = AutoModelForCausalLM.from_config(
        make_config_of(adapter), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    net.load_state_dict(adapter.net.state_dict())
    ids = torch.from_numpy(item.input_ids.astype(np.int64)).unsqueeze(0)
    with torch.no_grad():
        return float(net(input_ids=ids, labels=ids, use_cache=False).loss) * (len(item.labels) - 1)


def make_config_of(adapter: SpeechModel) -> Any:
    settings = adapter.net.config.to_dict()
    kind = settings.pop("model_type")
    config = type(adapter.net.config)(**settings)
    assert config.model_type == kind
    return config


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("name", [*STRETCHED, *MASKED])
def test_documents_on_both_sides_of_every_length_are_worth_what_they_are_alone(
    name: str, mode: str
) -> None:
    adapter = made({**STRETCHED, **MASKED}[name], mode)
    adapter.net.eval()
    for lengths in ([9, 40, 4, 17, 25], [3, 16, 20]):  # the second after the first
        items = documents(lengths)
        with torch.no_grad():
            together = loss_of(adapter, adapter.collate(batch_of(*items))).sum.item()
        assert together == pytest.approx(sum(alone(adapter, item) for item in items), rel=1e-5)


@pytest.mark.parametrize("name", [*STRETCHED, *STATES])
def test_answers_are_those_of_one_prompt_at_a_time(name: str) -> None:
    adapter = made({**STRETCHED, **STATES}[name], "padded")
    prompts = documents([14, 3, 20, 7, 14])
    singly = [adapter.generate([prompt], 6)[0] for prompt in prompts]
    assert adapter.generate(prompts, 6) == singly
    assert len({*singly}) > 2


def test_short_prompts_share_a_batch_where_only_long_ones_may_not() -> None:
    adapter = made(LONGROPE)
    assert adapter.verdict.answers == "length"
    assert len(adapter._batches([3, 5, 9], 7)) == 1
    assert len(adapter._batches([3, 5, 9], 8)) == 3


def test_document_lengths_follow_restarting_positions() -> None:
    rows = torch.tensor([[0, 1, 2, 0, 1, 0], [5, 6, 7, 8, 0, 1]])
    expected = [[3, 3, 3, 2, 2, 1], [9, 9, 9, 9, 2, 2]]
    assert rope.document_lengths(rows).tolist() == expected


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_encoders_that_see_both_ways_are_no_causal_models(kind: str, mode: str) -> None:
    with pytest.raises(UserError, match=rf"{kind} is no causal.*is_decoder: true") as caught:
        made({"model_type": kind, **{k: v for k, v in SMALL.items() if "key" not in k}}, mode)
    assert "\n" not in str(caught.value)


def test_a_copy_has_the_kinds_of_layers_and_short_lengths() -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = make_config(
        {
            "model_type": "qwen3",
            "vocab_size": 150_000,
            "num_hidden_layers": 16,
            "layer_types": kinds * 4,
            "use_sliding_window": True,
            "sliding_window": 4096,
        }
    )
    small = copies.small_config(config)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.num_hidden_layers == 2
    assert small.sliding_window == copies.WINDOW
    assert (config.num_hidden_layers, config.sliding_window) == (16, 4096), "the config is its own"
    net = copies.make(AutoModelForCausalLM._model_mapping[type(config)], small, 0)
    assert sum(p.numel() for p in net.parameters()) < 3_000_000


def test_a_verdict_names_what_was_scaled_and_is_kept() -> None:
    adapter = made(MASKED["phimoe"])
    assert "sliding_window 10 as 8" in adapter.verdict.describe()
    assert proof.prove(adapter.net) is proof.prove(adapter.net)


def test_parts_that_short_rows_do_not_reach_are_refused() -> None:
    with on_meta():
        net = AutoModelForCausalLM.from_config(
            make_config({"model_type": "deepseek_v4", "num_hidden_layers": 2})
        )
    for mode in ("packed", "padded"):
        with pytest.raises(UserError, match=r"deepseek_v4, .*work on 128 tokens at a time"):
            proof.refuse_early(net, mode)
