"""qlora on every processor: bitsandbytes lays 4-bit weights out otherwise where the processor has
AVX512-BF16. Here both are tried on any processor: where it lacks the instructions, the product of
the packed layout is computed by torch from bitsandbytes' own inverse of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from raysft.config.families import named
from raysft.driver.preflight import check
from raysft.errors import UserError
from raysft.models.meta import on_meta
from raysft.models.quantized import INPUTS, OUTPUTS, refuse_widths
from tests.support.adapters import Bench, inputs_of, logits_of, make_bench, plain_base, step_ids

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
HAS = bool(functional.has_avx512bf16())


@pytest.fixture(scope="module")
def bench(make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("quantized"), make_clips(4))


def product(hidden: torch.Tensor, packed: torch.Tensor, out: Any, state: Any) -> torch.Tensor:
    """What the instructions compute: in bf16, of weights in the packed layout."""
    weights, state = functional._convert_weight_packed_for_cpu_inverse(packed, copy.deepcopy(state))
    whole = functional.dequantize_4bit(weights, state).bfloat16()
    return (hidden.bfloat16() @ whole.T).to(hidden.dtype)


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """packing(True): bitsandbytes packs what is made from now on; False: it does not."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: on)
        if not HAS:
            monkeypatch.setattr(functional, "gemv_4bit", product)

    return switch


def is_packed(model: nn.Module) -> bool:
    states = [getattr(m.weight, "quant_state", None) for m in linear4(model)]
    assert states
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def linear4(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]


def test_a_run_that_is_evaluated_in_between_is_the_same_on_both_kinds_of_processor(
    bench: Bench, packing: Callable[[bool], None]
) -> None:
    dev = {
        "data__eval": [{"path": str(bench.corpora["causal_lm"]), "name": "dev"}],
        "evaluate__every": 3,
        "evaluate__generate": False,
    }
    packing(False)
    alone = bench.run(bench.config("alone", "qlora", "causal_lm"))
    losses, weights = [alone.losses], [dict(alone.job.strategy.module.named_parameters())]
    for on in (False, True):
        packing(on)
        run = bench.run(bench.config(f"packs_{on}", "qlora", "causal_lm", **dev))
        assert not is_packed(run.job.strategy.module)
        losses.append(run.losses)
        weights.append(dict(run.job.strategy.module.named_parameters()))
    assert losses[0] == losses[1] == losses[2]
    for name in alone.trained:
        assert torch.equal(weights[0][name], weights[1][name]), name
        assert torch.equal(weights[0][name], weights[2][name]), name


def test_a_run_of_one_kind_of_processor_goes_on_on_the_other(
    bench: Bench, packing: Callable[[bool], None]
) -> None:
    packing(False)
    whole = bench.run(bench.config("whole", "qlora", "causal_lm")).losses
    bench.run(bench.config("moves", "qlora", "causal_lm", train__max_steps=4))
    packing(True)
    assert bench.run(bench.config("moves", "qlora", "causal_lm")).losses == whole


def test_the_adapter_says_the_same_upon_a_base_that_is_packed(
    bench: Bench, packing: Callable[[bool], None]
) -> None:
    run = bench.run(bench.config("packed", "qlora", "causal_lm"))
    packing(True)
    base = plain_base(bench, "qlora", "causal_lm")
    for layer in linear4(base):
        layer.support_avx512bf16_for_cpu = True
    plain = PeftModel.from_pretrained(base, run.last / "adapter").eval()
    inputs, _ = inputs_of(run, step_ids(run, 1)[0])
    with torch.no_grad():
        mine, theirs = (logits_of(m.eval(), inputs) for m in (run.adapter.model, plain))
    assert is_packed(plain) and not is_packed(run.adapter.model)
    # It computes in bf16, with scales rounded to it.
    assert (mine - theirs).norm() < 0.05 * mine.norm()


@pytest.mark.parametrize("inputs", [32, 64, 96, 128, 160, 192])
@pytest.mark.parametrize("outputs", [16, 32, 48, 64])
def test_widths_are_refused_where_bitsandbytes_cannot_pack_them(inputs: int, outputs: int) -> None:
    data, state = functional.quantize_4bit(
        torch.randn(outputs, inputs), quant_type="nf4", compress_statistics=True
    )
    try:
        functional._convert_weight_packed_for_cpu(data, state)
        packs = True
    except (AssertionError, RuntimeError):
        packs = False
    assert packs == (inputs % INPUTS == 0 and outputs % OUTPUTS == 0)


def test_other_widths_are_refused_before_anything_starts(bench: Bench, tmp_path: Path) -> None:
    config = bench.config("narrow", "qlora", "causal_lm", base="causal_lm")
    with pytest.raises(
        UserError, match=r"q_proj is 32 wide and gives 32; .* of 64 and .* of 32; use peft.method: "
    ):
        check(config)


def test_what_stays_as_it_is_may_have_any_width() -> None:
    """Embeddings, a head of 259 rows, and an audio tower are not quantised."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    with on_meta():
        net = AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=259, num_hidden_layers=1, **wide)
        )
    refuse_widths(net, named("causal_lm"))
    net.audio_tower = nn.Linear(33, 7)
    refuse_widths(net, named("audio_lm"))
    with pytest.raises(UserError, match=r"audio_tower is 33 wide"):
        refuse_widths(net, named("causal_lm"))
