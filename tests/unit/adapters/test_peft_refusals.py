"""What adapters begin with, and what is refused: every message names the key and the remedy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from raysft.config import Config
from raysft.driver.preflight import check
from raysft.errors import UserError
from raysft.export import export_run
from tests.support.adapters import (
    LINEAR,
    UNITS,
    Bench,
    build_only,
    make_bench,
    same_logits,
)
from tests.support.models import CAUSAL

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def bench(make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("peft"), make_clips(40))


# -- an adapter to begin with --------------------------------------------------------------------


def test_a_run_begins_with_an_adapter(bench: Bench, tmp_path: Path) -> None:
    for method in ("lora", "ia3", "prompt"):
        first = bench.run(bench.config(f"first_{method}", method, "causal_lm"))
        path = tmp_path / method
        export_run(first.job.folder, path)
        config = bench.config(f"second_{method}", method, "causal_lm", peft__path=str(path))
        job, _ = bench.start(config)
        ended = dict(first.job.strategy.module.named_parameters())
        for name, p in job.strategy.module.named_parameters():
            assert torch.equal(p, ended[name]), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft": {"method": "ia3"}}, "it is a lora adapter, but peft.method is ia3"),
        ({"peft__r": 8}, "its r is 4, but peft.r gives 8"),
        ({"peft__alpha": 9}, "its lora_alpha is 8.0, but peft.alpha gives 9.0"),
        ({"peft__rslora": True}, "its use_rslora is False, but peft.rslora gives True"),
        (
            {"peft__target_modules": ["q_proj"]},
            "its target_modules .*up_proj.* are not those of peft.target_modules, .q_proj.",
        ),
        ({"base": "unitless"}, "trained on .*causal_lm, but model.path is .*unitless"),
        ({"peft__path": "/nowhere/at/all"}, "no such folder"),
    ],
)
def test_an_adapter_of_something_else_is_refused(
    changes: dict[str, Any], message: str, bench: Bench
) -> None:
    if ("given",) not in bench.runs:
        bench.runs["given",] = bench.run(bench.config("given", "lora", "causal_lm"))
    changes = {"peft__path": str(bench.runs["given",].last / "adapter"), **changes}
    with pytest.raises(UserError, match=f"peft.path .*: .*{message}"):
        method = changes.pop("peft", {"method": "lora"})["method"]
        build_only(bench, bench.config("wrong", method, "causal_lm", **changes))


# -- refusals ------------------------------------------------------------------------------------


REFUSED = [
    (
        ("lora", "causal_lm", {"peft__target_modules": ["q_prj", "v_proj"]}),
        "peft.target_modules: q_prj matches no layer of Qwen3ForCausalLM; names look like q_proj",
    ),
    (
        ("lora", "causal_lm", {"peft__target_modules": r".*\.attention\..*"}),
        "matches no layer of Qwen3ForCausalLM; names look like",
    ),
    (
        ("lora", "causal_lm", {"peft__target_modules": "*.q_proj"}),
        "is no regular expression",
    ),
    (
        ("lora", "causal_lm", {"peft__target_modules": ["embed_tokens"]}),
        "model.embed_tokens is no linear layer but a Embedding",
    ),
    (
        ("adalora", "causal_lm", {"base": "mixture", "peft__target_modules": ["experts"]}),
        "model.layers.0.mlp.experts is no linear layer but a Qwen3MoeExperts",
    ),
    (
        ("lora", "causal_lm", {"peft__exclude_modules": ["down_prj"]}),
        "peft.exclude_modules: down_prj matches no layer .* names look like down_proj",
    ),
    (
        ("ia3", "causal_lm", {"peft__modules_to_save": ["lm_haed"]}),
        "peft.modules_to_save: lm_haed matches no layer .* names look like lm_head",
    ),
    (
        ("lora", "causal_lm", {"peft__exclude_modules": LINEAR}),
        "peft.exclude_modules and peft.modules_to_save leave none",
    ),
    (
        ("ia3", "causal_lm", {"base": "unitless", "model__speech_units": UNITS}),
        "20 unit tokens are new .* peft.modules_to_save: .embed_tokens, lm_head., or lora",
    ),
    (
        ("prompt", "causal_lm", {"base": "unitless", "model__speech_units": UNITS}),
        "20 unit tokens are new .*; use lora, qlora or adalora",
    ),
    (
        ("ia3", "causal_lm", {"base": "tied", "model__speech_units": UNITS}),
        "20 unit tokens are new .*; use lora, qlora or adalora",
    ),
    (
        ("lora", "causal_lm", {"base": "tied", "peft__modules_to_save": ["embed_tokens"]}),
        "embed_tokens shares its weights with another table",
    ),
    (("adalora", "causal_lm", {"peft__init_r": 2}), "peft.init_r: 2 is not above peft.r: 2"),
    (
        ("adalora", "causal_lm", {"peft__tinit": 5, "peft__tfinal": 4}),
        "5 and 4 steps leave none of the 8 steps",
    ),
    (
        ("prefix", "audio_lm", {"model__family": "auto"}),
        "peft.method: prefix does not work with audio_lm",
    ),
    (("prompt", "audio_lm", {}), "prompt does not work with audio_lm .*ignored"),
    (("lora", "causal_lm", {"train__freeze": ["*"]}), "peft.exclude_modules"),
    (("prompt", "causal_lm", {"data__mode": "packed"}), "use data.mode: padded"),
]


@pytest.mark.parametrize("asked, message", REFUSED)
def test_what_cannot_work_is_refused_with_the_remedy(
    asked: tuple[str, str, dict[str, Any]], message: str, bench: Bench
) -> None:
    method, family, changes = asked
    with pytest.raises(UserError, match=message):
        build_only(bench, bench.config("refused", method, family, **changes))


@pytest.mark.parametrize(
    "asked, message",
    [
        *REFUSED[:5],
        (
            ("lora", "audio_lm", {"peft__target_modules": ["fc3"]}),
            "fc3 matches no layer of Qwen2AudioForConditionalGeneration; names look like fc",
        ),
        (("prompt", "audio_lm", {}), "prompt does not work with audio_lm"),
    ],
)
def test_layers_are_looked_for_before_weights_are_read(
    asked: tuple[str, str, dict[str, Any]], message: str, bench: Bench, tmp_path: Path
) -> None:
    method, family, changes = asked
    for file in ("config.json", "preprocessor_config.json"):
        if (bench.base(changes.get("base", family)) / file).exists():
            shutil.copy(bench.base(changes.get("base", family)) / file, tmp_path)
    config = bench.config("early", method, family, **changes | {"model__path": str(tmp_path)})
    with pytest.raises(UserError, match=message):
        check(config)
    right = bench.config("early", "ia3", family, model__path=str(tmp_path))
    check(right)


def test_weights_of_another_method_are_no_beginning(bench: Bench) -> None:
    bench.run(bench.config("anew", "lora", "causal_lm", train__max_steps=1))
    anew = {"train__max_steps": 2, "checkpoint__resume": "weights_only"}
    for method, key in (("none", "method"), ("ia3", "method")):
        with pytest.raises(UserError, match=f"weights_only, but peft.{key} is {method}"):
            bench.start(bench.config("anew", method, "causal_lm", **anew))
    with pytest.raises(UserError, match=r"peft.r is 8 .* peft.r 4; export that run"):
        bench.start(bench.config("anew", "lora", "causal_lm", peft__r=8, **anew))
    assert len(bench.run(bench.config("anew", "lora", "causal_lm", **anew)).losses) == 2


def test_an_adapter_without_a_base_is_not_exported(bench: Bench, tmp_path: Path) -> None:
    config = bench.config("baseless", "lora", "causal_lm").model_dump()
    config["model"] = Config.model_validate({"model": {**CAUSAL, "speech_units": UNITS}}).model
    run = bench.run(Config.model_validate(config))
    with pytest.raises(UserError, match=r"made from model.config; .* --merge"):
        export_run(run.job.folder, tmp_path / "adapter")
    export_run(run.job.folder, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    same_logits(run.adapter.model, merged, run)
