"""Adapters beside other settings: new tokens, whole modules, precision, shards, generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2AudioForConditionalGeneration,
)

from raysft import worker
from raysft.config import to_yaml
from raysft.data.encode import make_encoder
from raysft.export import export_run
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support import worlds
from tests.support.adapters import (
    ATTENTION,
    CASES,
    STEPS,
    UNITS,
    Bench,
    inputs_of,
    make_bench,
    plain_base,
    same_logits,
    tables,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def bench(make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("peft"), make_clips(40))


# -- rows of new tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["unitless", "tied"])
@pytest.mark.parametrize("method", ["lora", pytest.param("adalora", marks=pytest.mark.slow)])
def test_rows_of_new_tokens_train_and_are_saved(
    method: str, base: str, bench: Bench, tmp_path: Path
) -> None:
    run = bench.run(
        bench.config(
            f"rows_{base}_{method}", method, "causal_lm", base=base, model__speech_units=UNITS
        )
    )
    export_run(run.job.folder, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    new = tokenizer.convert_tokens_to_ids([f"<|unit{i}|>" for i in range(UNITS)])
    begun = plain_base(bench, method, "causal_lm", base)
    for table, before in zip(tables(merged), tables(begun), strict=True):
        assert torch.equal(table[: len(before)], before), "old rows stay"
        assert table.shape[0] == len(before) + UNITS
    trained = [name for name in run.trained if "trainable_tokens_delta" in name]
    assert len(trained) == (1 if base == "tied" else 2)
    after = dict(run.job.strategy.module.named_parameters())
    for name in trained:
        assert (after[name] != run.before[name]).any(1).all(), "every new row has moved"
    assert merged.config.tie_word_embeddings == (base == "tied")
    same_logits(run.adapter.model, merged, run)
    export_run(run.job.folder, tmp_path / "adapter")
    begun.resize_token_embeddings(len(tokenizer))
    assert new[-1] == len(tokenizer) - 1
    plain = PeftModel.from_pretrained(begun, tmp_path / "adapter")
    same_logits(run.adapter.model, plain, run)


def test_units_of_a_tokenizer_beside_the_model_are_new_to_it(bench: Bench) -> None:
    config = bench.config(
        "beside",
        "lora",
        "causal_lm",
        base="unitless",
        model__tokenizer=str(bench.base("causal_lm")),
    )
    encoder = make_encoder(config.model, config.data, bench.folder)
    assert len(encoder.new_ids) == UNITS
    known = bench.config("known", "lora", "causal_lm", model__speech_units=UNITS)
    assert make_encoder(known.model, known.data, bench.folder).new_ids == ()


def test_ia3_learns_new_tokens_by_whole_tables(bench: Bench, tmp_path: Path) -> None:
    changes = {"base": "unitless", "model__speech_units": UNITS}
    whole = {"peft__modules_to_save": ["embed_tokens", "lm_head"]}
    run = bench.run(bench.config("whole", "ia3", "causal_lm", **changes, **whole))
    assert sum("modules_to_save" in name for name in run.trained) == 2
    export_run(run.job.folder, tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same_logits(run.adapter.model, merged, run)


# -- precision, dropout, whole modules -----------------------------------------------------------


@pytest.mark.parametrize(
    "method, family",
    [
        ("prefix", "causal_lm"),
        ("lora", "audio_lm"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [CASES[0], *CASES[2:4], CASES[5]]
        ),
    ],
)
def test_bf16_stores_what_is_frozen_in_it_and_adapters_in_float32(
    method: str, family: str, bench: Bench
) -> None:
    changes = {"train__max_steps": 6}
    run = bench.run(
        bench.config(f"half_{method}_{family}", method, family, train__precision="bf16", **changes)
    )
    exact = bench.run(bench.config(f"exact_{method}_{family}", method, family, **changes)).losses
    # Each rounding to 8 bits is off by 0.2% on average, and those of a loss even out.
    assert run.losses == pytest.approx(exact, rel=0.01)
    assert run.losses != exact
    module = run.job.strategy.module
    for name, p in module.named_parameters():
        holder = module.get_submodule(name.rpartition(".")[0])
        kept = name in run.trained or "ranknum" in name or isinstance(holder, nn.LayerNorm)
        assert p.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_what_passes_from_layer_to_layer_stays_in_bf16(bench: Bench) -> None:
    """Nothing between adapters is cast to float32 and back, and norms are none of it; in float32
    everything is."""
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        config = bench.config(
            f"stream_{precision}", "lora", "causal_lm", train__precision=precision
        )
        job, _ = bench.start(config)
        seen: dict[str, set[torch.dtype]] = {}

        def look(
            module: nn.Module, args: tuple[object, ...], out: object, seen: Any = seen
        ) -> None:
            first = out[0] if isinstance(out, tuple) else out
            tensors = [t for t in (*args, first) if isinstance(t, torch.Tensor)]
            seen.setdefault(type(module).__name__, set()).update(t.dtype for t in tensors)

        for part in job.strategy.module.modules():
            # Linear are the adapters' matrices too: what they are given.
            if isinstance(part, nn.Linear) or type(part).__name__.endswith(("Layer", "RMSNorm")):
                part.register_forward_hook(look)
        train(job)
        assert {"Linear", "Qwen3DecoderLayer", "Qwen3RMSNorm"} <= seen.keys()
        assert all(found == {dtype} for found in seen.values()), seen


def test_modules_to_save_train_whole_beside_adapters(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(
        bench.config(
            "projector",
            "lora",
            "audio_lm",
            peft__modules_to_save=["multi_modal_projector"],
            peft__exclude_modules=["down_proj"],
            peft__rslora=True,
            peft__dora=True,
        )
    )
    saved = [name for name in run.trained if "modules_to_save" in name]
    assert saved and all("multi_modal_projector" in name for name in saved)
    assert not any("down_proj" in name or "audio_tower" in name for name in run.trained)
    assert any("lora_magnitude_vector" in name for name in run.trained)
    plain = PeftModel.from_pretrained(plain_base(bench, "lora", "audio_lm"), run.last / "adapter")
    same_logits(run.adapter.model, plain, run)
    export_run(run.job.folder, tmp_path / "out", merge=True)
    merged = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "out")
    same_logits(run.adapter.model, merged, run)


def test_a_mixture_has_adapters_on_what_is_no_expert(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(bench.config("mixture", "lora", "causal_lm", base="mixture"))
    assert {name.split(".")[7] for name in run.trained} == set(ATTENTION)
    base = plain_base(bench, "lora", "causal_lm", "mixture")
    same_logits(run.adapter.model, PeftModel.from_pretrained(base, run.last / "adapter"), run)
    export_run(run.job.folder, tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same_logits(run.adapter.model, merged, run)


def test_gradient_checkpointing_gives_the_same_losses(bench: Bench) -> None:
    plain, again = (
        bench.run(
            bench.config(f"recomputed_{on}", "lora", "audio_lm", train__gradient_checkpointing=on)
        ).losses
        for on in (False, True)
    )
    assert again == pytest.approx(plain, rel=1e-6)


# -- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, family", [("adalora", "audio_lm"), ("prefix", "causal_lm"), ("prompt", "causal_lm")]
)
def test_batched_answers_are_those_of_plain_peft_one_by_one(
    method: str, family: str, bench: Bench
) -> None:
    config = bench.config(
        f"answers_{method}",
        method,
        family,
        data__eval=[{"path": str(bench.corpora[family]), "name": "heard", "task": "asr"}],
        evaluate__at_end=False,
        evaluate__max_new_tokens=6,
        evaluate__max_examples=6,
        optim__lr=0.1,
        train__max_steps=STEPS,
    )
    run = bench.run(config)
    job, _ = bench.start(config)
    scores = worker.evaluate_checkpoint(job, predictions=job.folder / "said.jsonl")
    assert {"wer/heard", "loss/asr"} <= scores.keys()
    lines = read_lines(job.folder / "said.jsonl")
    said = {line["id"]: line["hypothesis"] for line in lines}
    assert any(said.values())
    plain = PeftModel.from_pretrained(
        plain_base(bench, method, family), run.last / "adapter"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(bench.base(family))
    for name in list(said)[:6]:
        inputs, labels = inputs_of(run, name)
        end = int((labels != -100).nonzero()[0])
        inputs |= {key: inputs[key][:, :end] for key in ("input_ids", "attention_mask")}
        answer = plain.generate(**inputs, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(answer[0, end:], skip_special_tokens=True)
        assert said[name] == text, name


# -- two workers ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_sharded_models_train_rows_and_modules_and_answer_alike(
    bench: Bench, tmp_path: Path
) -> None:
    """fsdp on two workers against one: new rows (tied or not), whole modules, half precision,
    recomputation; prompt tuning answers with as many prompts of one length as there are."""
    heard = [{"path": str(bench.corpora["causal_lm"]), "name": "heard", "task": "asr"}]
    units = {"model__speech_units": UNITS}
    answers = {"data__eval": heard, "evaluate__max_new_tokens": 4}
    bf16 = {"train__precision": "bf16"}
    asked: dict[str, tuple[str, str, dict[str, Any]]] = {
        "tied": ("lora", "causal_lm", {"base": "tied", **units}),
        "untied": ("adalora", "causal_lm", {"base": "unitless", **units}),
        "tables": (
            "ia3",
            "causal_lm",
            {"base": "unitless", **units, "peft__modules_to_save": ["embed_tokens", "lm_head"]},
        ),
        "projector": (
            "lora",
            "audio_lm",
            {
                "peft__modules_to_save": ["multi_modal_projector"],
                "peft__dora": True,
                "train__gradient_checkpointing": True,
            },
        ),
        "answers": ("prompt", "causal_lm", answers),
        "half": ("lora", "causal_lm", {"base": "tied", **units, **bf16}),
        "half_prefix": ("prefix", "causal_lm", {**answers, **bf16}),
    }
    configs: dict[int, list[Path]] = {1: [], 2: []}
    for name, (method, family, changes) in asked.items():
        for workers, strategy in ((1, "ddp"), (2, "fsdp")):
            config = bench.config(
                f"{name}_{strategy}", method, family, parallel__strategy=strategy, **changes
            )
            configs[workers].append(tmp_path / f"{name}_{strategy}.yaml")
            configs[workers][-1].write_text(to_yaml(config))
    for workers, paths in configs.items():
        assert worlds.run(workers, *paths) == 0
    for name in asked:
        runs = [bench.folder / "runs" / f"{name}_{strategy}" for strategy in ("ddp", "fsdp")]
        one, two = ([x["loss"] for x in read_lines(run / "metrics.jsonl")] for run in runs)
        assert two == pytest.approx(one, rel=1e-2 if "half" in name else 1e-5), name
        if (runs[0] / "predictions").exists() and "half" not in name:
            said = [read_lines(run / "predictions" / f"step_{STEPS}.jsonl") for run in runs]
            assert said[0] == said[1]
        held = [
            load_file(run / "checkpoints" / f"step_{STEPS}" / "adapter/adapter_model.safetensors")
            for run in runs
        ]
        assert held[0].keys() == held[1].keys()
