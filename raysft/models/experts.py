"""The experts of a mixture: transformers keeps the matrices of all experts of a layer as one.

Stands between the built model and whatever multiplies by experts: `use` says by what those that
`blocks.experts_of` finds compute (`model.moe.experts`). Each (token,
expert) is a row; rows are sorted by expert, go through grouped products (`grouped`), and are added
up again by token. Low-rank updates (`LowRank`, of `peft.experts`) are grouped products too: the
update of a matrix is never made.

A module's experts may be a worker's share of them: how many there are is read from its parameters.
Products are in the dtype of autocast, which does not know them, else in that of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sonicmoe import is_sonicmoe_loadable, sonicmoe_experts_forward

from raysft.config.moe import Backend
from raysft.errors import UserError
from raysft.models import grouped
from raysft.models.grouped import Groups, Product
from raysft.parallel.blocks import experts_of

BACKENDS: tuple[Backend, ...] = get_args(Backend)
# In whose one call weights, and nothing low-rank, go through.
WHOLE: tuple[Backend, ...] = ("sonicmoe",)
PRODUCTS: dict[Backend, Product] = {
    "torch": grouped.by_torch,
    "grouped_gemm": grouped.by_grouped_gemm,
    "loop": grouped.by_loop,
}
# Names that models have for the number of experts a token is sent to.
CHOSEN = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    "num_selected_experts",
)
MISSING = (
    "grouped_gemm is not installed; pip install 'raysft[gpu]' (it is built with CUDA's compiler), "
    "or use torch"
)
UP, GATED_UP, DOWN = "up_proj", "gate_up_proj", "down_proj"  # transformers' names, everywhere


class LowRank(nn.Module):
    """scale * B A for every expert's matrix: A [E, r, in], B [E, out, r], zero at the start."""

    def __init__(
        self, experts: int, width: int, out: int, rank: int, scale: float, dropout: float
    ) -> None:
        """width, out: of the matrix. dropout: of what goes in, in training."""
        super().__init__()
        bound = 1 / math.sqrt(width)  # as peft draws it
        self.A = nn.Parameter(torch.empty(experts, rank, width).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(experts, out, rank))
        self.scale, self.dropout = scale, dropout

    def forward(self, rows: torch.Tensor, product: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The update's share of the output, for rows [S, in] sorted by expert."""
        rows = F.dropout(rows, self.dropout, self.training)
        return product(product(rows, self.A.mT) * self.scale, self.B.mT)

    def delta(self, expert: int) -> torch.Tensor:
        """What is added to the matrix [out, in] of one expert."""
        return self.scale * self.B[expert] @ self.A[expert]


def check(net: nn.Module) -> None:
    """Raises UserError where `net` has no experts that `model.moe` could be about."""
    if not experts_of(net):
        raise UserError(
            f"model.moe: {type(net).__name__} has no experts (of those that transformers keeps as "
            "one matrix a layer); leave model.moe out"
        )


@contextmanager
def one_by_one(net: nn.Module) -> Iterator[None]:
    """The experts of `net`, with what is added to them, compute one after the other in here."""
    configs = [module.config for _, module in experts_of(net)]
    before = [config._experts_implementation for config in configs]  # type: ignore[union-attr]
    try:
        for config in configs:
            config._experts_implementation = "raysft_loop"  # type: ignore[union-attr]
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._experts_implementation = name  # type: ignore[union-attr]


def use(net: nn.Module, backend: Backend) -> None:
    """Let the experts of `net` compute by `backend`."""
    for _, module in experts_of(net):
        module.config._experts_implementation = f"raysft_{backend}"  # type: ignore[union-attr]


def require(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where experts cannot compute by `backend`: see `why_not`."""
    if (why := why_not(backend, device, dtype)) is not None:
        raise UserError(f"model.moe.experts: {why}")


def require_installed() -> None:
    """Raises UserError where the package grouped_gemm is not installed."""
    if not grouped.installed():
        raise UserError(f"model.moe.experts: {MISSING}")


def why_not(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """What stands against computing by `backend` on `device`, with the remedy; None: nothing."""
    if backend == "grouped_gemm":
        if not grouped.installed():
            return MISSING
        if device.type != "cuda":
            return f"grouped_gemm computes on GPUs only, and this is {device.type}; use torch"
    if backend == "sonicmoe":
        try:
            is_sonicmoe_loadable(raise_error=True)
        except ImportError as error:
            return f"{str(error).rstrip('.').partition('. Use')[0]}; use torch"
    if backend in ("grouped_gemm", "sonicmoe") and dtype != torch.bfloat16:
        return f"{backend} computes in bfloat16 only; set train.precision: bf16, or use torch"
    return None


def slow(backend: str, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Why torch's grouped products are slow on a GPU of that capability; None: they are not.

    backend: what computes, as `model.moe.experts`. Where they have no kernel they take one expert
    after the other, and wait for each: the loop does not.
    """
    if backend != "torch" or (dtype == torch.bfloat16 and capability >= (9, 0)):
        return None
    if dtype != torch.bfloat16:
        kind = str(dtype).removeprefix("torch.")
        why, remedy = f"in {kind}", "set train.precision: bf16, or "
    else:
        why, remedy = f"on a GPU of compute capability {'.'.join(map(str, capability))}", ""
    return (
        f"model.moe.experts: torch's grouped products are slow {why}: they are fast in bfloat16 "
        f"from capability 9.0 on; {remedy}set model.moe.experts: auto, which takes the fastest"
    )


def _forward(
    product: Product,
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Outputs [T, H] of tokens [T, H] by their experts [T, k], which are `self`'s, with these
    weights [T, k]; transformers' interface of a module of experts."""
    dtype = compute_dtype(self)
    count = self.down_proj.shape[0]
    chosen = top_k_index.shape[1]
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    groups = Groups.of(ids, count)
    # Ids of no expert here come last.
    others = (ids >= count).unsqueeze(-1) if self._is_expert_parallel else None
    own_ids = ids.clamp(max=count - 1)

    def times(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return product(rows, matrices.to(dtype), groups)

    def layer(name: str, rows: torch.Tensor) -> torch.Tensor:
        matrices = getattr(self, name)
        if others is not None:
            rows = rows.masked_fill(others, 0.0)
        out = times(rows, matrices if self.is_transposed else matrices.mT)
        if self.has_bias:
            out = out + getattr(self, f"{name}_bias").to(dtype)[own_ids]
        if name in updates:
            out.add_(updates[name](rows, times))  # no product keeps its output
        return out if others is None else out.masked_fill(others, 0.0)

    updates = getattr(self, "lora", {})
    rows = hidden_states[order // chosen].to(dtype)
    if self.has_gate:
        rows = self._apply_gate(layer(GATED_UP, rows))
    else:
        rows = self.act_fn(layer(UP, rows))
    rows = layer(DOWN, rows)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    # Not added up in place by token, which on GPUs has other last bits each time.
    summed = rows[back].view(*top_k_index.shape, rows.shape[-1]).sum(1)
    return summed.to(hidden_states.dtype)


def compute_dtype(experts: Any) -> torch.dtype:
    """What a module of experts multiplies in, here and now."""
    kind = experts.down_proj.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    found: torch.dtype = experts.down_proj.dtype
    return found


def _sonic(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As `_forward`, by the kernel `sonicmoe`."""
    dtype = compute_dtype(self)
    given = {name: p.to(dtype) for name, p in self.named_parameters()}
    flags = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
    like = SimpleNamespace(
        config=self.config,
        num_experts=self.down_proj.shape[0],
        **given,
        **{flag: getattr(self, flag) for flag in flags},
    )
    out: torch.Tensor = sonicmoe_experts_forward(
        like, hidden_states.to(dtype), top_k_index, top_k_weights
    )
    return out.to(hidden_states.dtype)


for _backend, _product in PRODUCTS.items():
    ALL_EXPERTS_FUNCTIONS.register(f"raysft_{_backend}", partial(_forward, _product))
ALL_EXPERTS_FUNCTIONS.register("raysft_sonicmoe", _sonic)
