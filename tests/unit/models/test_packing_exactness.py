"""A packed row is worth exactly its sequences alone, and models where it is not are refused."""

from __future__ import annotations

from typing import Any

import pytest

from raysft.errors import UserError
from tests.support.model_zoo import (
    CONFIGS,
    SMALL,
    batch_of,
    gradients,
    loss_of,
    make,
    plain_loss,
    sequences,
    worst,
)

LENGTHS = [9, 4, 17, 9, 12, 2]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_gradient_equals_the_sum_over_its_sequences_alone(name: str) -> None:
    adapter = make(name)
    items = sequences(adapter, LENGTHS)

    packed = loss_of(adapter, adapter.collate(batch_of(*items)))
    packed.sum.backward()
    ours = gradients(adapter)

    expected = 0.0
    for item in items:
        loss = plain_loss(adapter, item)
        if loss == loss:  # transformers averages over no token at all in an unsupervised sequence
            loss.backward()
            expected += loss.item()
    assert packed.sum.item() == pytest.approx(expected, rel=1e-5)
    assert packed.count.item() == sum((i.labels[1:] != -100).sum() for i in items)
    assert worst(ours, gradients(adapter)) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_loss_and_gradient_equal_the_packed_ones(name: str) -> None:
    results = []
    for mode in ("packed", "padded"):
        adapter = make(name, mode)
        losses = loss_of(adapter, adapter.collate(batch_of(*sequences(adapter, LENGTHS))))
        losses.sum.backward()
        results.append((losses.sum.item(), gradients(adapter)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert worst(results[0][1], results[1][1]) < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen2_audio"])
@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_gradient_checkpointing_changes_no_bit(name: str, mode: str) -> None:
    results = []
    for recompute in (False, True):
        adapter = make(name, mode)
        if recompute:
            adapter.enable_gradient_checkpointing()
        adapter.model.train()
        losses = loss_of(adapter, adapter.collate(batch_of(*sequences(adapter, LENGTHS))))
        losses.sum.backward()
        results.append((losses.sum.item(), gradients(adapter)))
    assert results[0][0] == results[1][0]
    assert worst(results[0][1], results[1][1]) == 0


INEXACT: dict[str, dict[str, Any]] = {
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
    "lfm2": {"model_type": "lfm2", **SMALL, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "model_type": "qwen3_next",
        **SMALL,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
}


@pytest.mark.parametrize("name", INEXACT)
def test_models_that_carry_state_across_documents_are_refused_in_packed_mode(name: str) -> None:
    CONFIGS[name] = INEXACT[name]
    try:
        with pytest.raises(
            UserError, match=r"data.mode: packed is not exact.*use data.mode: padded"
        ):
            make(name)
    finally:
        del CONFIGS[name]
