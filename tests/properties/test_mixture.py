"""LLaMA-Factory 9222: experts that no token is sent to must not make other workers wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysft.config import to_yaml
from raysft.run.lines import read_lines
from tests.support import worlds
from tests.support.models import CAUSAL
from tests.support.worlds import tiny

MOE = {
    **CAUSAL["config"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 16,
    "num_experts": 32,
    "num_experts_per_tok": 1,
}


@pytest.mark.slow
def test_a_mixture_trains_alike_under_zero3_and_fsdp_with_idle_experts(tmp_path: Path) -> None:
    """32 experts, one a token, micro-batches of some 30 tokens: many experts stay idle."""
    losses = {}
    for strategy, size in (("ddp", 1), ("zero3", 2), ("fsdp", 2)):
        config = tiny(
            tmp_path,
            strategy,
            model__config=MOE,
            parallel__strategy=strategy,
            parallel__workers=size,
            data__tokens_per_batch=64,
            train__max_steps=6,
        )
        path = tmp_path / f"{strategy}.yaml"
        path.write_text(to_yaml(config))
        assert worlds.run(size, path) == 0
        lines = read_lines(tmp_path / "runs" / strategy / "metrics.jsonl")
        losses[strategy] = [line["loss"] for line in lines]
    assert losses["zero3"] == pytest.approx(losses["ddp"], rel=1e-4)
    assert losses["fsdp"] == pytest.approx(losses["ddp"], rel=1e-4)
