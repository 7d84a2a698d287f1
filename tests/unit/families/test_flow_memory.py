"""The activations that --dry-run tells of are those that autograd keeps, to 20%."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raysft import worker
from raysft.config import Config
from raysft.data.encode import make_encoder
from raysft.data.example import MicroBatch, Sequence
from raysft.models import SpeechModel
from raysft.train.estimate import estimate

FROZEN = ["encoder.*", "input_embedding.*", "encoder_proj.*"]
SMALL = {
    "unit_width": 128,
    "encoder_width": 128,
    "encoder_heads": 4,
    "encoder_ffn": 512,
    "encoder_blocks": 3,
    "encoder_up_blocks": 2,
    "width": 192,
    "depth": 6,
    "heads": 4,
    "ffn": 512,
    "conv_groups": 4,
}
CASES = [
    pytest.param(SMALL | {"estimator": "dit"}, [], "fp32", id="dit"),
    pytest.param(SMALL | {"estimator": "dit"}, FROZEN, "fp32", id="dit frozen"),
    pytest.param(SMALL | {"estimator": "voicebox"}, [], "fp32", id="voicebox"),
    pytest.param({}, [], "fp32", id="step", marks=pytest.mark.slow),
    pytest.param({}, FROZEN, "fp32", id="step frozen", marks=pytest.mark.slow),
    pytest.param({}, [], "bf16", id="step bf16", marks=pytest.mark.slow),
    pytest.param({"estimator": "voicebox"}, [], "bf16", id="usdm bf16", marks=pytest.mark.slow),
]


def autograd_keeps(model: SpeechModel, mb: MicroBatch, half: bool) -> int:
    """Bytes of what is saved for the backward pass, each storage once, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    sizes: dict[int, int] = {}
    held: list[torch.Tensor] = []  # or another would be given its place

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    batch = model.collate(mb)
    model.supervised.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model.loss(batch)
    return sum(sizes.values())


@pytest.mark.parametrize(("shape", "freeze", "precision"), CASES)
def test_activations_are_those_that_are_kept(
    shape: dict[str, Any], freeze: list[str], precision: str, tmp_path: Path
) -> None:
    tree: dict[str, Any] = {
        "data": {"mode": "padded", "tokens_per_batch": 1000},
        "train": {"freeze": freeze, "precision": precision},
        "model": {"config": {"model_type": "raysft_flow_decoder", **shape}},
        "parallel": {"device": "cpu"},
    }
    config = Config.model_validate(tree)
    model, _ = worker.build_model(config, make_encoder(config.model, config.data, tmp_path), 10)
    documents = [model.full_document(500) for _ in range(2)]  # 10 s each, of Step's mel
    sequences = [Sequence("a", "flow", d.input_ids, d.input_ids, d.arrays) for d in documents]
    seen = autograd_keeps(model, MicroBatch.join(0, 1, 0, sequences), precision == "bf16")
    assert estimate(config, model, 1).activations == pytest.approx(seen, rel=0.2)
