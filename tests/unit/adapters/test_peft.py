"""Adapters against plain torch and plain peft: losses, files, resume, export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import (
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from raysft.errors import UserError
from raysft.export import export_run
from raysft.models import PREFIX
from raysft.train.loop import train
from tests.support.adapters import (
    CASES,
    CLIP,
    LR,
    STEPS,
    Bench,
    Trained,
    base_of,
    inputs_of,
    logits_of,
    make_bench,
    plain_base,
    plain_settings,
    same_logits,
    step_ids,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def bench(make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("peft"), make_clips(40))


def plain_loop(model: Any, run: Trained, adalora: bool) -> list[float]:
    """Train `model` on what the ledger says the run trained on, example by example."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    losses = []
    for step in range(1, STEPS + 1):
        total, count = torch.zeros(()), 0
        for name in step_ids(run, step):
            inputs, labels = inputs_of(run, name)
            logits = logits_of(model, inputs)
            total = total + F.cross_entropy(
                logits[:-1], labels[1:], ignore_index=-100, reduction="sum"
            )
            count += int((labels[1:] != -100).sum())
        loss = total / count
        losses.append(loss.item())
        if adalora:  # what peft adds to a loss of transformers is what is left without that
            tuner, given = model.base_model, {**inputs, "labels": labels[None]}
            loss = loss + tuner(**given).loss - tuner.model(**given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        if adalora:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return losses


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, bench: Bench) -> tuple[str, str, Trained]:
    method, family = request.param
    return method, family, bench.run(bench.config(f"{method}_{family}", method, family))


def test_losses_are_those_of_a_plain_peft_loop(case: Any, bench: Bench) -> None:
    method, family, run = case
    plain = get_peft_model(plain_base(bench, method, family), plain_settings(method, family))
    own = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert {name.removeprefix(PREFIX) for name in run.trained} == own
    plain.load_state_dict({name: run.before[PREFIX + name] for name in own}, strict=False)
    assert run.losses == pytest.approx(plain_loop(plain, run, method == "adalora"), rel=1e-5)


def test_every_adapter_moves_and_nothing_else(case: Any) -> None:
    _, _, run = case
    after = dict(run.job.strategy.module.named_parameters())
    moved = {name for name, values in run.before.items() if not torch.equal(values, after[name])}
    # AdaLoRA begins with ranks of zero, and a layer that loses all of them ends there.
    emptied = {n for n in run.trained if "lora_E" in n and not after[n].any()}
    assert moved | emptied == run.trained
    assert not emptied or len(emptied) < sum("lora_E" in name for name in run.trained) / 2
    assert all(after[name].dtype == torch.float32 for name in moved)


def test_the_adapter_in_a_checkpoint_loads_in_plain_peft(case: Any, bench: Bench) -> None:
    method, family, run = case
    base = plain_base(bench, method, family)
    plain = PeftModel.from_pretrained(base, run.last / "adapter")
    same_logits(run.adapter.model, plain, run)
    settings = json.loads((run.last / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(bench.base(base_of(method, family)))
    assert settings["inference_mode"] is True


def test_the_adapter_folder_is_what_peft_saves_itself(case: Any, tmp_path: Path) -> None:
    _, _, run = case
    run.adapter.model.save_pretrained(tmp_path, save_embedding_layers=False)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = run.last / "adapter" / name, tmp_path / name
        if name.endswith("json"):
            ours, theirs = (json.loads(path.read_text()) for path in (ours, theirs))
            for settings in (ours, theirs):  # sets, in any order
                for key in ("target_modules", "feedforward_modules"):
                    if isinstance(settings.get(key), list):
                        settings[key].sort()
            assert ours == theirs
        else:
            ours, theirs = load_file(ours), load_file(theirs)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_exported_adapter_says_what_the_run_says(
    case: Any, bench: Bench, tmp_path: Path
) -> None:
    method, family, run = case
    assert export_run(run.job.folder, tmp_path / "out") == STEPS
    plain = PeftModel.from_pretrained(plain_base(bench, method, family), tmp_path / "out")
    same_logits(run.adapter.model, plain, run)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) >= 259


def test_a_merged_export_says_what_the_run_says(case: Any, bench: Bench, tmp_path: Path) -> None:
    method, family, run = case
    if method in ("prefix", "prompt"):
        with pytest.raises(UserError, match=r"positions, which cannot be merged"):
            export_run(run.job.folder, tmp_path / "out", merge=True)
        return
    export_run(run.job.folder, tmp_path / "out", merge=True)
    auto = type(run.adapter.net)
    merged, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    mine = run.adapter.model
    if method == "qlora":  # merged into the base as it was before its 4 bits
        base = plain_base(bench, "lora", family, base_of(method, family))
        mine = PeftModel.from_pretrained(base, run.last / "adapter")
    same_logits(mine, merged, run)


def test_merged_weights_of_a_run_in_half_precision_are_rounded_once(
    bench: Bench, tmp_path: Path
) -> None:
    """Base and adapter are added in float32, and only their sum is rounded."""
    run = bench.run(bench.config("half", "lora", "causal_lm", train__precision="bf16"))
    export_run(run.job.folder, tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    base = plain_base(bench, "lora", "causal_lm").state_dict()
    adapter = load_file(run.last / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    low, high = (adapter[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    change = 8 / 4 * (high @ low)  # alpha / r
    exact = base[f"{name}.weight"].double() + change
    found = merged.state_dict()[f"{name}.weight"]
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0)  # half a bf16 step
    twice = (base[f"{name}.weight"].bfloat16() + change.bfloat16()).double()
    assert (found.double() - exact).abs().sum() < (twice - exact).abs().sum()


@pytest.mark.parametrize(
    "method, steps", [("lora", (4,)), ("adalora", (6, 4, 2)), ("prompt", (4,)), ("qlora", (4,))]
)
def test_a_run_goes_on_from_any_checkpoint_as_if_nothing_had_happened(
    method: str, steps: tuple[int, ...], bench: Bench
) -> None:
    """Of AdaLoRA from before ranks fall, from between two falls, and from after the last."""
    config = bench.config(f"again_{method}", method, "causal_lm", checkpoint__every=2)
    whole = bench.run(config).losses
    for step in steps:
        for later in range(step + 2, STEPS + 1, 2):
            shutil.rmtree(bench.folder / "runs" / config.run.name / "checkpoints" / f"step_{later}")
        assert bench.run(config).losses == whole, step


# -- ranks ---------------------------------------------------------------------------------------


def test_ranks_fall_to_their_target(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(bench.config("ranks", "adalora", "causal_lm", checkpoint__every=1))
    weights = load_file(run.last / "adapter" / "adapter_model.safetensors")
    ranks = [len(values) for name, values in weights.items() if name.endswith("lora_E")]
    assert sum(ranks) == 2 * len(ranks), "their mean is peft.r"
    assert len(set(ranks)) > 1, "they fell where they matter least"
    early = load_file(run.last.parent / "step_1" / "adapter" / "adapter_model.safetensors")
    assert {len(v) for name, v in early.items() if name.endswith("lora_E")} == {4}
    # Between two falls, ranks that were taken away have grown again, and count.
    for later in (6, 7, 8):
        shutil.rmtree(run.last.parent / f"step_{later}")
    for name, merge in (("adapter", False), ("merged", True)):
        assert export_run(run.job.folder, tmp_path / name, merge) == 5
    base = plain_base(bench, "adalora", "causal_lm")
    adapter = PeftModel.from_pretrained(base, tmp_path / "adapter")
    same_logits(adapter, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), run)


def test_ranks_are_fixed_even_if_that_very_step_was_skipped(bench: Bench) -> None:
    job, _ = bench.start(bench.config("skipped", "adalora", "causal_lm"))
    known = job.adapters.after_step
    job.adapters.after_step = lambda step: known(step) if step != STEPS - 2 else None
    train(job)
    settings = json.loads(
        (job.folder / f"checkpoints/step_{STEPS}/adapter/adapter_config.json").read_text()
    )
    left = [sum(mask) for mask in settings["rank_pattern"].values()]
    assert sum(left) == 2 * len(left)
