"""Adapters on fused experts: peft's own, which makes whole updates, is the reference."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from raysft.adapters import experts
from raysft.config import Config, to_yaml
from raysft.config.load import validate
from raysft.config.training import Peft
from raysft.data.encode import make_encoder
from raysft.driver import preflight
from raysft.errors import UserError
from raysft.export import export, export_run
from raysft.models import build
from raysft.parallel.blocks import experts_of
from raysft.train.loop import train
from tests.support import worlds
from tests.support.adapters import (
    LANES,
    STEPS,
    Bench,
    Trained,
    copy_of,
    plain_base,
    same_logits,
)
from tests.support.fused import Tokens, make, stand_in, through
from tests.support.model_zoo import CONFIGS
from tests.support.models import CAUSAL
from tests.support.worlds import units

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

EXPERTS, R = 8, 8
TARGETS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
ADAPTED: dict[str, Any] = {"peft__experts": True, "peft__r": R, "peft__alpha": 32}
MIXTURE = {"base": "qwen3_moe", **ADAPTED}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two mixtures: of experts alone, and with a dense layer and an expert that all share."""
    folder = tmp_path_factory.mktemp("experts")
    for name in ("qwen3_moe", "deepseek_v2"):
        settings = {**CONFIGS[name], "num_experts_per_tok": 2}
        settings["num_experts" if name == "qwen3_moe" else "n_routed_experts"] = EXPERTS
        model = {**CAUSAL, "config": settings, "speech_units": 20}
        config = Config.model_validate({"model": model})
        encoder = make_encoder(config.model, config.data, folder)
        export(build(config.model, config.data, encoder, 1), folder / name)
    return Bench(folder, {"causal_lm": units(folder)})


# -- the product ---------------------------------------------------------------------------------


class Small(torch.nn.Module):
    """A model that is a layer of experts."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.experts = layer

    def get_decoder(self) -> torch.nn.Module:
        return self.mlp


@pytest.mark.parametrize("backend", ["torch", "loop"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_outputs_and_gradients_are_those_of_whole_updates(kind: str, backend: str) -> None:
    net: Any = Small(make(kind, 16, 24, EXPERTS))
    names = [n for n, p in net.mlp.experts.named_parameters() if p.ndim == 3]
    whole = get_peft_model(
        Small(make(kind, 16, 24, EXPERTS)),  # type: ignore[arg-type]
        LoraConfig(
            r=R,
            lora_alpha=32,
            target_modules=[],
            target_parameters=[f"mlp.experts.{n}" for n in names],
        ),
    )
    config = Config(peft=Peft(method="lora", experts=True, r=R, alpha=32))
    found = experts.matrices(config.peft, net)
    net.requires_grad_(False)
    experts.attach(config, net, found)
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    named = {f"{experts.INSIDE}{name}": p for name, p in net.named_parameters()}
    files = experts.to_files(found, named)
    for key, tensor in files.items():
        whole.get_parameter(key.replace(".weight", ".default.weight")).data.copy_(tensor.detach())
    plain: Any = whole.get_submodule("base_model.model.mlp.experts")

    for tokens in (Tokens.random(40, 16, EXPERTS), Tokens.random(1, 16, EXPERTS)):
        ours = through(net.mlp.experts, tokens, f"raysft_{backend}")
        plain.config = plain.get_base_layer().config
        theirs = through(plain, tokens, "eager")
        for name in ("out", "rows", "weights"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
        gradients = {
            f"{experts.INSIDE}{name}": p.grad
            for name, p in net.named_parameters()
            if p.requires_grad
        }
        for key, gradient in experts.to_files(found, gradients).items():
            same = whole.get_parameter(key.replace(".weight", ".default.weight")).grad
            assert same is not None
            torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-4)


def test_grouped_gemm_multiplies_updates_too(monkeypatch: pytest.MonkeyPatch) -> None:
    package = stand_in(monkeypatch)
    net: Any = Small(make("qwen3_moe", 16, 24, EXPERTS))
    config = Config(peft=Peft(method="lora", experts=True, r=R))
    net.requires_grad_(False)
    experts.attach(config, net, experts.matrices(config.peft, net))
    for update in net.mlp.experts.lora.values():
        torch.nn.init.normal_(update.B, std=0.3)
    tokens = Tokens.random(40, 16, EXPERTS)
    with torch.autocast("cpu", torch.bfloat16):
        ours = through(net.mlp.experts, tokens, "raysft_grouped_gemm")
        theirs = through(net.mlp.experts, tokens, "raysft_loop")
    assert len(package) == 6 and ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=0.02, atol=0.02 * value.abs().max().item()
        )


class Made(TorchDispatchMode):
    """Notes the size of whatever is computed that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("backend", ["torch", "loop"])
def test_an_update_is_never_made_whole(backend: str) -> None:
    net: Any = Small(make("qwen3_moe", 64, 96, EXPERTS))
    config = Config(peft=Peft(method="lora", experts=True, r=R))
    net.requires_grad_(False)
    experts.attach(config, net, experts.matrices(config.peft, net))
    with Made() as made:
        through(net.mlp.experts, Tokens.random(16, 64, EXPERTS), f"raysft_{backend}")
    assert made.largest < EXPERTS * 64 * 96  # the smaller of the two matrices


def test_dropout_is_of_what_goes_in_and_in_training_alone() -> None:
    net: Any = Small(make("qwen3_moe", 16, 24, EXPERTS))
    config = Config(peft=Peft(method="lora", experts=True, r=R, dropout=0.5))
    experts.attach(config, net, experts.matrices(config.peft, net))
    for _, update in net.mlp.experts.lora.items():
        torch.nn.init.normal_(update.B)
    layer, tokens = net.mlp.experts, Tokens.random(20, 16, EXPERTS)
    update, rows = layer.lora["down_proj"], torch.ones(1, 24)
    with torch.no_grad():
        assert not torch.equal(layer(*tokens), layer(*tokens))
        drawn = torch.stack([update(rows, lambda x, m: x @ m[0]) for _ in range(4000)])
        net.eval()
        assert torch.equal(layer(*tokens), layer(*tokens))
        expected = update(rows, lambda x, m: x @ m[0])
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0.2, atol=0.5)  # the mean is kept


# -- runs ----------------------------------------------------------------------------------------


@dataclass
class Case:
    """A run over a base, and the experts that had tokens, by the name of the layer."""

    name: str
    run: Any
    sent: dict[str, set[int]]


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v2"])
def case(request: pytest.FixtureRequest, bench: Bench) -> Case:
    name = request.param
    job, prepared = bench.start(bench.config(name, "lora", "causal_lm", base=name, **ADAPTED))
    sent: dict[str, set[int]] = {}
    for layer, module in experts_of(job.strategy.module):
        ids = sent.setdefault(layer, set())
        module.register_forward_pre_hook(
            lambda _, args, ids=ids: ids.update(args[1].flatten().tolist())
        )
    before = copy_of(job.strategy.module)
    train(job)
    return Case(name, Trained(job, prepared, before), sent)


def test_experts_that_had_tokens_move_and_nothing_else(case: Case) -> None:
    run = case.run
    after = dict(run.job.strategy.module.named_parameters())
    moved = {name for name, values in run.before.items() if not torch.equal(values, after[name])}
    assert moved == run.trained
    assert sum(".experts.lora." in name for name in moved) == 4 * len(case.sent)
    for layer, ids in case.sent.items():
        for part in ("gate_up_proj.A", "gate_up_proj.B", "down_proj.A", "down_proj.B"):
            name = f"{layer}.lora.{part}"
            changed = (after[name] - run.before[name]).flatten(1).any(1).nonzero().flatten()
            if ".layers.0." in layer:
                assert {*changed.tolist()} == ids, name
            else:  # the last layer: its outputs count where something is supervised
                assert {*changed.tolist()} <= ids and len(changed) >= EXPERTS // 2, name


def test_peft_loads_the_adapter_and_says_the_same(case: Case, bench: Bench, tmp_path: Path) -> None:
    name, run = case.name, case.run
    for folder in (run.last / "adapter", tmp_path / "out"):
        if folder.name == "out":
            export_run(run.job.folder, folder)
        base = AutoModelForCausalLM.from_pretrained(bench.base(name))
        before = base.state_dict()["model.layers.1.mlp.experts.down_proj"].clone()
        plain = PeftModel.from_pretrained(base, folder)
        same_logits(run.adapter.model, plain, run)
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["target_parameters"] == TARGETS
        merged = plain.merge_and_unload().state_dict()["model.layers.1.mlp.experts.down_proj"]
        assert not torch.equal(before, merged)


def test_a_merged_export_says_the_same(case: Case, tmp_path: Path) -> None:
    run = case.run
    export_run(run.job.folder, tmp_path / "out", merge=True)
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    same_logits(run.adapter.model, merged, run)
    assert "raysft" not in (tmp_path / "out" / "config.json").read_text()


def test_a_run_goes_on_as_if_nothing_had_happened_dropout_too(bench: Bench) -> None:
    config = bench.config(
        "again",
        "lora",
        "causal_lm",
        **MIXTURE,
        peft__dropout=0.2,
        checkpoint__every=4,
    )
    whole = bench.run(config).losses
    folder = bench.folder / "runs" / "again" / "checkpoints"
    shutil.rmtree(folder / f"step_{STEPS}")
    run = bench.run(config)
    assert run.losses == whole
    settings = json.loads((run.last / "adapter" / "adapter_config.json").read_text())
    assert settings["lora_dropout"] == 0.0  # which peft's own form refuses


def test_a_run_begins_with_an_adapter_of_experts(case: Case, bench: Bench, tmp_path: Path) -> None:
    name, first = case.name, case.run
    export_run(first.job.folder, tmp_path / "out")
    begun = {"base": name, **ADAPTED, "peft__path": str(tmp_path / "out")}
    job, _ = bench.start(bench.config(f"second_{name}", "lora", "causal_lm", **begun))
    ended = dict(first.job.strategy.module.named_parameters())
    for parameter, value in job.strategy.module.named_parameters():
        assert torch.equal(value, ended[parameter]), parameter

    with pytest.raises(UserError, match=r"adapts some of its experts, .* peft\.experts: false"):
        bench.start(
            bench.config(f"third_{name}", "lora", "causal_lm", **{**begun, "peft__experts": False})
        )


def test_experts_of_a_quantised_base_get_adapters(bench: Bench, tmp_path: Path) -> None:
    """They stay as they are, in train.precision; what else is linear is in 4 bits."""
    import bitsandbytes

    model = {**CAUSAL, "speech_units": 20}
    model["config"] = {**CONFIGS["qwen3_moe"], "hidden_size": 64, "head_dim": 32}
    whole = Config.model_validate({"model": model})
    encoder = make_encoder(whole.model, whole.data, bench.folder)
    export(build(whole.model, whole.data, encoder, 1), bench.folder / "wide")
    settings = {**ADAPTED, "base": "wide", "peft__target_modules": ["q_proj", "v_proj"]}
    run = bench.run(bench.config("four_bits", "qlora", "causal_lm", **settings))
    net = run.job.strategy.module
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in net.modules()) == 8
    after = dict(net.named_parameters())
    moved = {name for name, values in run.before.items() if not torch.equal(values, after[name])}
    assert moved == run.trained and sum(".experts.lora." in name for name in moved) == 8
    assert run.losses[-1] < run.losses[0]

    plain = PeftModel.from_pretrained(
        plain_base(bench, "qlora", "causal_lm", "wide"), run.last / "adapter"
    )
    same_logits(run.adapter.model, plain, run)
    export_run(run.job.folder, tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    base = AutoModelForCausalLM.from_pretrained(bench.base("wide")).state_dict()
    for name in merged:
        assert torch.equal(merged[name], base[name]) != (
            "experts" in name or "q_proj" in name or "v_proj" in name
        ), name


# -- workers -------------------------------------------------------------------------------------


def worker_losses(bench: Bench, name: str, strategy: str, size: int) -> list[float]:
    config = bench.config(
        name,
        "lora",
        "causal_lm",
        **MIXTURE,
        parallel__strategy=strategy,
        parallel__workers=size,
    )
    path = bench.folder / f"{name}.yaml"
    path.write_text(to_yaml(config))
    assert worlds.run(size, path) == 0
    lines = (bench.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_workers_train_what_one_trains(strategy: str, bench: Bench) -> None:
    alone = bench.run(bench.config(f"one_{strategy}", "lora", "causal_lm", **MIXTURE))
    losses = worker_losses(bench, f"many_{strategy}", strategy, LANES)
    assert losses == pytest.approx(alone.losses, rel=1e-5)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"peft__r": 12},
            "peft.r: 12, but with peft.experts a multiple of 8: grouped products take rows of 16 "
            "bytes; use 8 or 16",
        ),
        ({"peft__r": 4}, "rows of 16 bytes; use 8"),
        ({"peft__dora": True}, "peft.dora: does not go with peft.experts: peft knows no"),
        (
            {"model__moe": {"experts": "sonicmoe"}, "train__precision": "bf16"},
            "model.moe.experts: sonicmoe multiplies by whole matrices only",
        ),
        ({"peft__method": "ia3"}, "peft.experts: does nothing with peft.method: ia3; lora, qlora"),
        (
            {"peft__exclude_modules": ["experts"]},
            "peft.experts: Qwen3MoeForCausalLM has no experts that could get adapters",
        ),
        (
            {"peft__target_modules": ["up_proj"], "base": "deepseek_v2"},
            "up_proj: in a mixture of experts peft takes this name for the experts; leave it out "
            "(theirs: peft.experts: true)",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(
    changes: dict[str, Any], message: str, bench: Bench
) -> None:
    given = {"base": "qwen3_moe", **ADAPTED, **changes}
    method = given.pop("peft__method", "lora")
    if method == "ia3":
        given = {"base": "qwen3_moe", "peft__experts": True}
    with pytest.raises(UserError) as refused:
        config = bench.config("refused", method, "causal_lm", **given)
        validate(config.model_dump(mode="json"), "here")
        preflight.check(config)
    assert message in str(refused.value)


def test_a_dense_model_has_no_experts_to_adapt() -> None:
    settings = AutoConfig.for_model(**{**CONFIGS["qwen3"], "vocab_size": 64})
    net = AutoModelForCausalLM.from_config(settings)
    with pytest.raises(UserError, match=r"^peft\.experts: Qwen3ForCausalLM has no experts"):
        experts.matrices(Peft(method="lora", experts=True), net)
