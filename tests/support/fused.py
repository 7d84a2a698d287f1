"""Modules of fused experts, of several kinds, and what goes through them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

# With a gate; [in, out] with biases and a gate of its own; without a gate; with a norm behind.
KINDS = ("qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark")


def make(kind: str, width: int, inner: int, count: int) -> Any:
    """`count` experts of tokens of `width`, with `inner` units within."""
    torch.manual_seed(0)
    layer: Any
    if kind == "qwen3_moe":
        layer = Qwen3MoeExperts(
            Qwen3MoeConfig(hidden_size=width, moe_intermediate_size=inner, num_experts=count)
        )
    elif kind == "gpt_oss":
        layer = GptOssExperts(
            GptOssConfig(hidden_size=width, intermediate_size=inner, num_local_experts=count)
        )
    elif kind == "nemotron_h":
        layer = NemotronHExperts(
            NemotronHConfig(hidden_size=width, moe_intermediate_size=inner, n_routed_experts=count)
        )
    else:
        layer = MuseSparkExperts(
            MuseSparkTextConfig(
                moe_hidden_size=width, moe_intermediate_size=inner, num_local_experts=count
            )
        )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


class Tokens(NamedTuple):
    """rows [T, H], the experts of each [T, k], and their weights [T, k]."""

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, number: int, width: int, experts: int, chosen: int = 2) -> Tokens:
        """Of random experts, none twice for a token."""
        ids = torch.rand(number, experts).topk(chosen).indices
        return cls(torch.randn(number, width), ids, torch.rand(number, chosen))


def through(layer: Any, tokens: Tokens, implementation: str) -> dict[str, torch.Tensor]:
    """The output, and the gradients of a sum of all of it, each with its own share."""
    layer.config._experts_implementation = implementation
    layer.zero_grad()
    rows = tokens.rows.detach().clone().requires_grad_()
    weights = tokens.weights.detach().clone().requires_grad_()
    out = layer(rows, tokens.ids, weights)
    (out.float() * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    found = {"out": out.detach(), "rows": rows.grad, "weights": weights.grad}
    trained = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {name: value.clone() for name, value in (found | trained).items() if value is not None}


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A stand-in for grouped_gemm, as strict as it is: bfloat16 [S, k] and [E, k, n] that lie in
    one piece, the sizes on the host, which add up to S; gradients of empty groups are whatever
    was there before. Returns the sizes of each product."""
    seen: list[torch.Tensor] = []

    class Gmm(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, a: torch.Tensor, b: torch.Tensor, sizes: torch.Tensor, trans_b: bool
        ) -> torch.Tensor:
            assert a.dtype == b.dtype == torch.bfloat16 and sizes.dtype == torch.int64
            assert a.is_contiguous() and b.is_contiguous() and sizes.device.type == "cpu"
            assert sizes.shape == b.shape[:1] and int(sizes.sum()) == len(a)
            ctx.save_for_backward(a, b)
            ctx.sizes, ctx.trans_b = sizes.tolist(), trans_b
            seen.append(sizes)
            parts = a.split(ctx.sizes)
            return torch.cat([x @ (m.T if trans_b else m) for x, m in zip(parts, b, strict=True)])

        @staticmethod
        def backward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            a, b = ctx.saved_tensors
            rows, gradients = a.split(ctx.sizes), given[0].split(ctx.sizes)
            of_a = [g @ (m if ctx.trans_b else m.T) for g, m in zip(gradients, b, strict=True)]
            of_b = torch.full_like(b, torch.nan)
            for number, (x, g) in enumerate(zip(rows, gradients, strict=True)):
                if len(x):
                    of_b[number] = g.T @ x if ctx.trans_b else x.T @ g
            return torch.cat(of_a), of_b, None, None

    def gmm(
        a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False
    ) -> torch.Tensor:
        found: torch.Tensor = Gmm.apply(a, b, batch_sizes, trans_b)
        return found

    monkeypatch.setitem(sys.modules, "grouped_gemm", SimpleNamespace(ops=SimpleNamespace(gmm=gmm)))
    return seen
