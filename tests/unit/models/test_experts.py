"""The experts of mixtures: found in any architecture, refused where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raysft.errors import UserError
from raysft.models import experts
from tests.support.model_zoo import CONFIGS

MIXTURES = ("qwen3_moe", "deepseek_v2")


def net_of(name: str, **settings: Any) -> Any:
    config = {**CONFIGS[name], "vocab_size": 64, **settings}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_of_every_layer_are_found(name: str) -> None:
    found = experts.experts_of(net_of(name))

    assert [path for path, _ in found] == {
        "qwen3_moe": ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"],
        "deepseek_v2": ["model.layers.1.mlp.experts"],  # the first layer is dense
    }[name]
    for _, module in found:
        assert {p.shape[0] for p in module.parameters()} == {module.num_experts}


def test_a_dense_model_has_none_and_refuses_the_keys() -> None:
    net = net_of("qwen3")

    assert experts.experts_of(net) == []
    with pytest.raises(UserError, match=r"^model\.moe: Qwen3ForCausalLM has no experts .* leave"):
        experts.use(net, "torch")
