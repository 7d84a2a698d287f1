"""The experts of a mixture: transformers keeps the matrices of all experts of a layer as one.

Stands between the built model and whatever multiplies by experts: `experts_of` finds them in a
model of any architecture, `use` says by what they compute (`model.moe.experts`).
"""

from __future__ import annotations

import importlib.util

from torch import nn
from transformers import PreTrainedModel

from raysft.config.moe import Backend, Experts
from raysft.errors import UserError

# Our name for a way to compute -> transformers'.
IMPLEMENTATIONS: dict[Backend, str] = {
    "torch": "grouped_mm",
    "sonicmoe": "sonicmoe",
    "loop": "eager",
}


def experts_of(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each layer's experts in `net`, in its order: modules whose matrices are
    parameters [E, ...] of three dimensions, the experts in the first. [] of a dense model, and of
    one whose experts are modules each."""
    return [
        (name, module)
        for name, module in net.named_modules()
        if hasattr(module, "_is_expert_parallel") and hasattr(module, "num_experts")
    ]


def check(net: nn.Module) -> None:
    """Raises UserError where `net` has no experts that `model.moe` could be about."""
    if not experts_of(net):
        raise UserError(
            f"model.moe: {type(net).__name__} has no experts (of those that transformers keeps as "
            "one matrix a layer); leave model.moe out"
        )


def use(net: PreTrainedModel, backend: Experts) -> None:
    """Let the experts of `net` compute by `backend`; auto: by torch, until others are tried.

    Raises UserError where they cannot."""
    check(net)
    if backend == "grouped_gemm" and importlib.util.find_spec("grouped_gemm") is None:
        raise UserError(
            "model.moe.experts: grouped_gemm is not installed; pip install 'raysft[gpu]' (it "
            "builds with CUDA's compiler), or use torch"
        )
    net.set_experts_implementation(IMPLEMENTATIONS["torch" if backend == "auto" else backend])
