"""Every strategy with every PEFT method and every family: the same losses, the same checkpoints.

Two gloo processes and three lanes (so the second worker has a turn of weight zero) against one
process; what a combination cannot do is refused in tests/unit/config/test_combinations.py. `make
test` runs one whole pair and one step of all strategies; the slow test runs all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    Qwen2AudioForConditionalGeneration,
)

from raysft.audit import audit
from raysft.config import Config, load_config
from raysft.config.combinations import contradictions
from raysft.data.encode import make_encoder
from raysft.export import export, export_run
from raysft.models import SpeechModel, build
from raysft.run.catalogue import Catalogue
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from raysft.train.checkpoint import read_weights
from raysft.worker import build_model
from tests.support import whisper, worlds
from tests.support.models import AUDIO, CAUSAL

STEPS = 10
STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
METHODS = ("none", "lora", "adalora", "ia3", "prefix", "prompt")
FAMILIES = {
    "causal_lm": AutoModelForCausalLM,
    "audio_lm": Qwen2AudioForConditionalGeneration,
    "seq2seq": AutoModelForSpeechSeq2Seq,
}
UNITS = 20
Case = tuple[str, str, str]  # strategy, method, family


def _cases() -> list[Case]:
    """All that is not refused."""
    cases = [(s, m, f) for s in STRATEGIES for m in METHODS for f in FAMILIES]
    return [case for case in cases if not contradictions(Config.model_validate(tree(*case)))]


def tree(strategy: str, method: str, family: str) -> dict[str, Any]:
    """A config without its paths."""
    peft: dict[str, Any] = {"method": method}
    if method in ("lora", "adalora"):
        peft |= {"r": 4, "alpha": 8}
    if method == "adalora":
        peft |= {"init_r": 6, "tinit": 2, "tfinal": 2, "every": 2}
    if method in ("prefix", "prompt"):
        peft |= {"virtual_tokens": 3}
    audio, seq2seq = family != "causal_lm", family == "seq2seq"
    return {
        "run": {"name": f"{strategy}_{method}_{family}", "seed": 3},
        "data": {
            "train": [{"path": "corpus"}],
            "lanes": 3,
            "tokens_per_batch": 500 if audio else 120,
            "window": 40,
            "mode": "padded" if seq2seq or method in ("prefix", "prompt") else "packed",
            **({"language": "en"} if seq2seq else {}),
        },
        "model": {"path": "base", "family": family} | ({} if audio else {"speech_units": UNITS}),
        "peft": peft,
        "parallel": {"strategy": strategy},
        # A vector a layer moves the loss of a random base less than its batches differ.
        "optim": {"lr": 1e-1 if method == "ia3" else 1e-2, "weight_decay": 0.01, "clip": 0.1},
        "train": {"max_steps": STEPS},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 4},
    }


class Bench:
    """Bases, corpora, and runs by case."""

    def __init__(self, folder: Path, clips: Path) -> None:
        self.folder = folder
        items = [
            {"id": f"u{i}", "input": f"[Hu{i % UNITS}]" * (1 + i % 7), "output": f"text {i}"}
            for i in range(60)
        ]
        units = folder / "units.json"
        units.write_text(json.dumps(items))
        self.corpus = {"causal_lm": units, "audio_lm": clips, "seq2seq": clips}
        for family, model in (
            ("causal_lm", {**CAUSAL, "speech_units": UNITS}),
            ("audio_lm", AUDIO),
            ("seq2seq", whisper.model(folder)),
        ):
            mode = "padded" if family == "seq2seq" else "packed"
            config = Config.model_validate({"model": model, "data": {"mode": mode}})
            encoder = make_encoder(config.model, config.data, folder)
            export(build(config.model, config.data, encoder, 1), folder / family)

    def config(self, case: Case, name: str, **sections: dict[str, Any]) -> Path:
        found = tree(*case)
        found["run"] |= {"name": name, "storage_path": str(self.folder / "runs")}
        found["data"]["train"] = [{"path": str(self.corpus[case[2]])}]
        found["model"]["path"] = str(self.folder / case[2])
        for section, values in sections.items():
            found.setdefault(section, {}).update(values)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(found))
        return path

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def bench(make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("matrix"), make_clips(40))


def column(run: Path, key: str) -> list[float]:
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line[key] for line in lines]


def check(bench: Bench, cases: list[Case]) -> None:
    """One process as the reference, then two by strategy: undisturbed, and left and continued."""
    one = {}
    for _, method, family in cases:
        one[method, family] = bench.config(("ddp", method, family), f"one_{method}_{family}")
    assert worlds.run(1, *one.values(), module="tests.support.matrix") == 0
    for strategy in dict.fromkeys(strategy for strategy, _, _ in cases):
        mine = [case for case in cases if case[0] == strategy]
        whole = [bench.config(case, "_".join(case)) for case in mine]
        again = [bench.config(case, "again_" + "_".join(case)) for case in mine]
        assert worlds.run(2, *whole, *again, kill_at=7, module="tests.support.matrix") == 0
    for case in cases:
        compare(bench, case)


def compare(bench: Bench, case: Case) -> None:
    _, method, family = case
    name = "_".join(case)
    reference, whole, again = (
        bench.run(n) for n in (f"one_{method}_{family}", name, f"again_{name}")
    )
    assert column(whole, "loss") == pytest.approx(column(reference, "loss"), rel=1e-4), case
    norms = column(reference, "grad_norm")
    assert column(whole, "grad_norm") == pytest.approx(norms, rel=1e-3), case
    assert column(whole, "loss")[-1] < column(whole, "loss")[0], f"{case} learns nothing"
    for key in ("loss", "grad_norm"):
        assert column(again, key) == column(whole, key), f"{case}: resume is not exact"
    assert audit(again).clean
    moved = json.loads((whole / "moved.json").read_text())
    expected = json.loads((reference / "moved.json").read_text())
    assert {n for n, p in moved.items() if p["trains"]} == {
        n for n, p in expected.items() if p["trains"]
    }, case
    assert_export_speaks(bench, case, whole)
    wrong = [n for n, p in moved.items() if p["trains"] != p["moved"]]
    assert not wrong, f"{case}: trains, but has not moved, or the reverse: {wrong}"


def assert_export_speaks(bench: Bench, case: Case, run: Path) -> None:
    """Plain transformers and peft, given the exported folder, say what the run's model says."""
    _, method, family = case
    out = bench.folder / "exported" / run.name
    export_run(run, out)
    kind = FAMILIES[family]
    if method == "none":
        plain = kind.from_pretrained(out)
    else:
        plain = PeftModel.from_pretrained(kind.from_pretrained(bench.folder / family), out)
    config = read_config(run)
    encoder = make_encoder(config.model, config.data, run)
    ours, _ = build_model(config, encoder, STEPS)
    saved, _ = Catalogue.of(config.checkpoint, run).newest()
    assert saved is not None
    ours.supervised.load_state_dict(read_weights(saved), strict=False)
    batch = ours.dummy()
    names = ("input_features", "feature_attention_mask")
    inputs = {name: batch[name] for name in names if name in batch}
    ids = torch.randint(5, 250, (1, 9), generator=torch.Generator().manual_seed(0))
    if family == "seq2seq":
        inputs["decoder_input_ids"] = torch.cat([batch["decoder_input_ids"], ids], 1)
    else:
        inputs["input_ids"] = torch.cat([batch["input_ids"], ids], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        expected = ours.model.eval()(**inputs, use_cache=False).logits
        said = plain.eval()(**whole_rows(inputs, ours), use_cache=False).logits
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"{case}: {m}")


def whole_rows(inputs: dict[str, torch.Tensor], ours: SpeechModel) -> dict[str, torch.Tensor]:
    """Features of Qwen2-Audio as long as transformers wants them."""
    if "feature_attention_mask" not in inputs:
        return inputs
    more = ours.frames_limit - inputs["feature_attention_mask"].shape[-1]
    names = ("input_features", "feature_attention_mask")
    return inputs | {name: F.pad(inputs[name], (0, more)) for name in names}


PAIRS: list[Case] = [("fsdp", "lora", "audio_lm"), ("fsdp", "lora", "seq2seq")]


def test_a_strategy_with_adapters_trains_alike_and_resumes_exactly(bench: Bench) -> None:
    check(bench, PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_of_a_strategy_train_alike_and_resume_exactly(strategy: str, bench: Bench) -> None:
    check(bench, [case for case in _cases() if case[0] == strategy and case not in PAIRS])


GRADIENTS: list[Case] = [
    ("ddp", "lora", "causal_lm"),
    ("fsdp", "lora", "causal_lm"),
    ("fsdp", "adalora", "causal_lm"),
    ("fsdp", "ia3", "audio_lm"),
    ("fsdp", "prefix", "causal_lm"),
    ("zero1", "lora", "causal_lm"),
    ("zero2", "lora", "causal_lm"),
    ("zero3", "lora", "causal_lm"),
    *((strategy, "none", "seq2seq") for strategy in ("ddp", "fsdp", "zero3")),
]


def test_gradients_are_those_of_the_whole_global_batch(bench: Bench) -> None:
    """Each worker has other examples, and the workers other numbers of turns: without an average
    over all of them the difference is of the size of the gradient itself."""
    alone = {
        (method, family): bench.config(("ddp", method, family), f"gradient_{method}_{family}")
        for _, method, family in GRADIENTS
    }
    shared = [bench.config(case, "gradient_" + "_".join(case)) for case in GRADIENTS]
    assert worlds.run(1, *alone.values(), kill_at=-1, module="tests.support.matrix") == 0
    assert worlds.run(2, *shared, kill_at=-1, module="tests.support.matrix") == 0
    for case, path in zip(GRADIENTS, shared, strict=True):
        found = load_file(bench.run(path.stem) / "gradient.safetensors")
        expected = load_file(bench.run(alone[case[1:]].stem) / "gradient.safetensors")
        assert found.keys() == expected.keys()
        largest = max(float(g.abs().max()) for g in expected.values())
        assert largest > 0
        for name, gradient in expected.items():
            difference = float((found[name] - gradient).abs().max())
            assert difference < 1e-5 * largest, f"{case}: {name} differs by {difference:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("none", [("ddp", 2), ("fsdp", 1), ("ddp", 3)]),
        ("lora", [("fsdp", 2), ("ddp", 1), ("fsdp", 3)]),
        ("lora", [("zero2", 2), ("zero2", 1), ("ddp", 2)]),
    ],
    ids=str,
)
def test_a_run_moves_between_strategies_and_numbers_of_workers(
    method: str, stages: list[tuple[str, int]], bench: Bench
) -> None:
    """Left in the middle twice, each time without a word, and taken up by others."""
    name = f"left_{method}_{stages[0][0]}"
    whole = bench.config(("ddp", method, "causal_lm"), f"whole_{name}", checkpoint={"every": 3})
    assert worlds.run(1, whole, module="tests.support.matrix") == 0
    for (strategy, size), leave_at in zip(stages, (5, 8, 0), strict=True):
        config = bench.config((strategy, method, "causal_lm"), name, checkpoint={"every": 3})
        assert worlds.run(size, config, kill_at=leave_at, module="tests.support.matrix") == 0
    expected = column(bench.run(whole.stem), "loss")
    assert column(bench.run(name), "loss") == pytest.approx(expected, rel=1e-4)
    assert audit(bench.run(name)).clean


def test_every_config_of_the_matrix_is_accepted_or_refused_with_a_reason(bench: Bench) -> None:
    """27 + 17 + 17 of the 90 combinations work; the others say why not and what to do."""
    cases = _cases()
    assert sum(f == "causal_lm" for _, _, f in cases) == 27
    assert sum(f == "audio_lm" for _, _, f in cases) == 17
    assert sum(f == "seq2seq" for _, _, f in cases) == 17
    for case in cases:
        assert load_config(bench.config(case, "_".join(case)))
