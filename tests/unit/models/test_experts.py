"""The experts of mixtures: found in any architecture, and the same by whatever they compute.

The reference is the loop that each model class of transformers has as its forward.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raysft.errors import UserError
from raysft.models import experts, fastest
from tests.support.fused import KINDS, Tokens, make, stand_in, through
from tests.support.model_zoo import CONFIGS

CPU = torch.device("cpu")
MIXTURES = ("qwen3_moe", "deepseek_v2")
EXPERTS = 8
# How far sums of some dozen products may lie apart, by what they are rounded to.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}


def net_of(name: str, **settings: Any) -> Any:
    config = {**CONFIGS[name], "vocab_size": 64, **settings}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def assert_alike(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], close: float
) -> None:
    """To `close` of the largest value of each."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        most = value.float().abs().max().item()
        away = (ours[name].float() - value.float()).abs().max().item()
        assert away <= close * max(most, 1.0), name


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
        experts.check(net)


def cases(width: int) -> dict[str, Tokens]:
    torch.manual_seed(1)
    rows = torch.randn(7, width)
    return {
        "any": Tokens.random(40, width, EXPERTS),
        "empty experts": Tokens.random(3, width, EXPERTS, chosen=1),
        "one token": Tokens.random(1, width, EXPERTS),
        "all on one": Tokens(rows, torch.full((7, 1), 5), torch.rand(7, 1)),
    }


@pytest.mark.parametrize("backend", ["torch", "loop"])
@pytest.mark.parametrize("width, inner", [(16, 24), (13, 7)], ids=["even", "odd"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_loop(
    kind: str, width: int, inner: int, backend: str
) -> None:
    layer = make(kind, width, inner, EXPERTS)
    for tokens in cases(width).values():
        assert_alike(
            through(layer, tokens, f"raysft_{backend}"),
            through(layer, tokens, "eager"),
            CLOSE[torch.float32],
        )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "loop"])
def test_in_half_precision_products_are_in_it_and_outputs_as_the_loop_has_them(
    backend: str, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast does not know grouped_mm, which alone would multiply float32 weights as such."""
    multiplied = set()

    def product(rows: torch.Tensor, matrices: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        multiplied.add((rows.dtype, matrices.dtype))
        return own(rows, matrices, offs=offs)

    own = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", product)
    layer = make("qwen3_moe", 16, 24, EXPERTS)
    for tokens in cases(16).values():
        with torch.autocast("cpu", half):
            ours = through(layer, tokens, f"raysft_{backend}")
            theirs = through(layer, tokens, "eager")
        assert_alike(ours, theirs, CLOSE[half])
        assert ours["out"].dtype == torch.float32  # as the tokens
    assert multiplied == ({(half, half)} if backend == "torch" else set())


@pytest.mark.parametrize("backend", ["torch", "loop"])
def test_no_token_at_all_gives_none_and_gradients_of_zero(backend: str) -> None:
    """A worker of expert parallelism to whose experts nothing came."""
    layer = make("qwen3_moe", 16, 24, EXPERTS)
    none = Tokens(torch.randn(0, 16), torch.zeros(0, 1, dtype=torch.long), torch.rand(0, 1))

    found = through(layer, none, f"raysft_{backend}")

    assert found["out"].shape == (0, 16)
    assert not found["gate_up_proj"].any() and not found["down_proj"].any()


@pytest.mark.parametrize("backend", ["torch", "loop", "grouped_gemm"])
def test_a_share_of_the_experts_gives_its_share_of_the_sum(
    backend: str, package: list[torch.Tensor]
) -> None:
    """As transformers' own expert parallelism calls it: local ids, and one past them for others."""
    whole = make("qwen3_moe", 16, 24, EXPERTS)
    tokens = Tokens.random(30, 16, EXPERTS)
    half = backend == "grouped_gemm"
    found = {"out": torch.zeros_like(tokens.rows)}
    gradients = []
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected = through(whole, tokens, "eager")
        for first in (0, EXPERTS // 2):
            part = make("qwen3_moe", 16, 24, EXPERTS // 2)
            for name, parameter in part.named_parameters():
                own = whole.get_parameter(name)[first : first + EXPERTS // 2]
                parameter.data.copy_(own)
            part._is_expert_parallel = True
            ids = tokens.ids - first
            theirs = (ids < 0) | (ids >= EXPERTS // 2)
            ids = ids.masked_fill(theirs, EXPERTS // 2)
            sent = Tokens(tokens.rows, ids, tokens.weights.masked_fill(theirs, 0.0))
            share = through(part, sent, f"raysft_{backend}")
            found["out"] += share["out"]
            gradients.append(share["down_proj"])
    found["down_proj"] = torch.cat(gradients)

    close = CLOSE[torch.bfloat16 if half else torch.float32]
    assert_alike(found, {name: expected[name] for name in found}, close)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    return stand_in(monkeypatch)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("width, inner", [(16, 24), (13, 7)], ids=["even", "odd"])
def test_grouped_gemm_gets_what_it_takes(
    kind: str, width: int, inner: int, package: list[torch.Tensor]
) -> None:
    layer = make(kind, width, inner, EXPERTS)
    for tokens in cases(width).values():
        with torch.autocast("cpu", torch.bfloat16):
            ours = through(layer, tokens, "raysft_grouped_gemm")
            theirs = through(layer, tokens, "eager")
        assert_alike(ours, theirs, CLOSE[torch.bfloat16])
    assert package


def test_what_cannot_compute_here_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.bfloat16
    assert experts.why_not("torch", CPU, half) is None
    assert experts.why_not("loop", CPU, half) is None
    with pytest.raises(UserError) as missing:
        experts.require("grouped_gemm", torch.device("cuda"), half)
    assert str(missing.value) == (
        "model.moe.experts: grouped_gemm is not installed; pip install 'raysft[gpu]' (it is built "
        "with CUDA's compiler), or use torch"
    )
    with pytest.raises(UserError, match=r"^model\.moe\.experts: sonic.* `kernels` .*; use torch$"):
        experts.require("sonicmoe", CPU, half)
    monkeypatch.setattr("raysft.models.grouped.installed", lambda: True)
    with pytest.raises(UserError, match=r"grouped_gemm computes on GPUs only, .* cpu; use torch$"):
        experts.require("grouped_gemm", CPU, half)
    with pytest.raises(UserError, match=r"bfloat16 only; set train\.precision: bf16, or use torch"):
        experts.require("grouped_gemm", torch.device("cuda"), torch.float32)
    assert experts.why_not("grouped_gemm", torch.device("cuda"), half) is None


def test_all_that_can_are_timed_on_a_layer_of_the_models_shapes() -> None:
    net = net_of("qwen3_moe")
    before = {name: p.clone() for name, p in net.named_parameters()}
    implementation = net.config._experts_implementation

    found = fastest.milliseconds(net, CPU, torch.bfloat16, tokens=32)

    assert list(found.ms) == ["torch", "loop"] and all(took > 0 for took in found.ms.values())
    assert not found.failed
    assert net.config._experts_implementation == implementation
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())
