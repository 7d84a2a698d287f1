"""The training core against plain torch: losses, schedules, precision, freezing, quarantine."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Qwen2AudioForConditionalGeneration,
    Qwen3ForCausalLM,
    WhisperFeatureExtractor,
)

from raysft import worker
from raysft.config import Config
from raysft.config.schedule import rate
from raysft.config.schema import Optim
from raysft.data.clips.audio import load
from raysft.driver.preflight import Prepared, prepare
from raysft.errors import UserError
from raysft.models import PREFIX
from raysft.parallel import World
from raysft.run.lines import read_lines
from raysft.train.job import Job
from raysft.train.loop import train
from tests.support.models import AUDIO, CAUSAL

torch.set_num_threads(1)

LANES, STEPS, WARMUP, CLIP, DECAY, LR = 3, 10, 4, 0.5, 0.1, 3e-3


@dataclass
class Run:
    """A job about to be trained in this process, on one worker."""

    prepared: Prepared
    job: Job

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the model's weights, as transformers names them."""
        state = self.job.strategy.module.state_dict()
        return {name.removeprefix(PREFIX): tensor.clone() for name, tensor in state.items()}

    def train(self) -> list[dict[str, Any]]:
        """Train; returns the lines of metrics.jsonl."""
        train(self.job)
        return read_lines(self.job.folder / "metrics.jsonl")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """make_run(corpus, model, section__key=value, ...); spoil(prepared) before anything is read."""
    made = 0

    def make(
        corpus: Path,
        model: dict[str, Any],
        spoil: Callable[[Prepared], None] | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
        **changes: Any,
    ) -> Run:
        nonlocal made
        made += 1
        tree: dict[str, Any] = {
            "run": {"name": f"run{made}", "storage_path": str(tmp_path), "seed": 1},
            "data": {
                "train": [{"path": str(corpus)}],
                "lanes": LANES,
                "tokens_per_batch": 400,
                "index_path": str(tmp_path / f"index{made}"),
            },
            "model": copy.deepcopy(model),
            "optim": {
                "lr": LR,
                "weight_decay": DECAY,
                "schedule": "cosine",
                "warmup": WARMUP,
                "clip": CLIP,
            },
            "train": {"max_steps": STEPS},
            "log": {"every": 1, "tensorboard": False},
        }
        for key, value in changes.items():
            section, name = key.split("__")
            tree[section][name] = value
        config = Config.model_validate(tree)
        folder = tmp_path / f"run{made}"
        folder.mkdir()
        prepared = prepare(config, folder)
        if spoil is not None:
            spoil(prepared)
        data = worker.Data.in_process(
            config, prepared.encoder, folder, prepared.train, prepared.eval
        )
        world = World.current()
        job = worker.build_job(config, folder, world, data, prepared.total_steps, progress)
        return Run(prepared, job)

    return make


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 items of MoST JSON, asr and tts in turn, where a letter is two units."""
    rng = np.random.default_rng(0)
    items = []
    for number in range(60):
        text = "".join(rng.choice(list("abcdefghij "), rng.integers(3, 40)))
        spoken = "".join(f"[Hu{2 * (ord(c) % 10)}][Hu{2 * (ord(c) % 10) + 1}]" for c in text)
        pair = (spoken, text) if number % 2 else (text, spoken)
        items.append(
            {"id": f"u{number}", "instruction": "Go.", "input": pair[0], "output": pair[1]}
        )
    path = tmp_path_factory.mktemp("units") / "train.json"
    path.write_text(json.dumps(items))
    return path


UNIT_LM = {**CAUSAL, "speech_units": 20}
AUDIO_LM = copy.deepcopy(AUDIO)
AUDIO_LM["config"]["audio_config"]["dropout"] = 0.0


# -- the losses of a plain loop ------------------------------------------------------------------


def ledger_ids(folder: Path, step: int) -> list[str]:
    """Every id that the run trained on in `step`."""
    found = []
    for lane in range(LANES):
        lines = read_lines(folder / "ledger" / f"lane_{lane}_from_1.jsonl")
        found += [name for line in lines if line["step"] == step for name in line["ids"]]
    return found


def summed_losses(model: Any, run: Run) -> Callable[[str], tuple[torch.Tensor, int]]:
    """id -> transformers on that example alone: summed cross-entropy, and of how many tokens."""
    index, encoder = run.prepared.train, run.prepared.encoder
    examples = {example.id: example for example in index.examples(np.arange(len(index)))}
    extractor = WhisperFeatureExtractor(**AUDIO["feature_extractor"])

    def of(name: str) -> tuple[torch.Tensor, int]:
        clips = [load(audio.path, encoder.sample_rate) for audio in examples[name].audio()]
        sequence = encoder.encode(examples[name], clips)
        ids, labels = (
            torch.tensor(values).long() for values in (sequence.input_ids, sequence.labels)
        )
        inputs: dict[str, torch.Tensor] = {"input_ids": ids[None]}
        if clips:
            heard = extractor(
                clips, sampling_rate=16000, return_attention_mask=True, return_tensors="pt"
            )
            inputs |= {
                "input_features": heard["input_features"],
                "feature_attention_mask": heard["attention_mask"],
                "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            }
        logits = model(**inputs, use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        return loss, int((labels[1:] != -100).sum())

    return of


def plain_loop(model: Any, run: Run) -> list[dict[str, float]]:
    """Train `model` on what the ledger says the run trained on; loss, norm and rate by step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    model.train()
    of, lines = summed_losses(model, run), []
    for step in range(1, STEPS + 1):
        parts = [of(name) for name in ledger_ids(run.job.folder, step)]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        if step <= WARMUP:
            rate = LR * step / WARMUP
        else:
            rate = LR * (1 + math.cos(math.pi * (step - 1 - WARMUP) / (STEPS - WARMUP))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": rate})
    return lines


@pytest.mark.parametrize("family", ["causal_lm", "audio_lm"])
@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_losses_are_those_of_a_plain_loop_over_single_sequences(
    family: str, mode: str, units: Path, make_clips: Callable[..., Path], make_run: Any
) -> None:
    if family == "causal_lm":
        run, plain_class = make_run(units, UNIT_LM, data__mode=mode), Qwen3ForCausalLM
    else:
        corpus = make_clips(40, tasks=("asr",))
        run = make_run(corpus, AUDIO_LM, data__mode=mode)
        plain_class = Qwen2AudioForConditionalGeneration
    config = copy.deepcopy(run.job.strategy.module.lm.config)
    plain = plain_class._from_config(config, attn_implementation="sdpa")
    plain.load_state_dict(run.weights())
    for name, parameter in run.job.strategy.module.lm.named_parameters():
        plain.get_parameter(name).requires_grad_(parameter.requires_grad)
    lines = run.train()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, expected in zip(lines, plain_loop(plain, run), strict=True):
        found = {name: line[name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-5), line["step"]


# -- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup, steps", [(0, 0), (5, 5), (0.1, 4)])
@pytest.mark.parametrize(
    "schedule, decay",
    [
        ("constant", lambda share: 1.0),
        ("linear", lambda share: 1 - share),
        ("cosine", lambda share: math.cos(math.pi * share / 2) ** 2),
    ],
)
def test_learning_rates_follow_their_closed_form(
    schedule: str, decay: Callable[[float], float], warmup: float, steps: int
) -> None:
    optim, total = Optim(lr=2.0, schedule=schedule, warmup=warmup), 40
    rates = [optim.lr * rate(optim, step, total) for step in range(1, total + 1)]
    rising = [2.0 * (i + 1) / steps for i in range(steps)]
    falling = [2.0 * decay(i / (total - steps)) for i in range(total - steps)]
    assert rates == pytest.approx(rising + falling)
    assert min(rates) > 0, "every step moves, the last one too"


# -- precision, checkpointing, freezing ----------------------------------------------------------


def test_bf16_trains_float32_weights(units: Path, make_run: Any) -> None:
    changes = {"train__max_steps": 30, "optim__schedule": "constant"}
    exact = make_run(units, UNIT_LM, **changes).train()
    run = make_run(units, UNIT_LM, train__precision="bf16", **changes)
    lines = run.train()
    assert {tensor.dtype for tensor in run.weights().values()} == {torch.float32}
    assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.01)
    assert lines[0]["loss"] != exact[0]["loss"]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.05)


@pytest.mark.parametrize("model", [UNIT_LM, AUDIO], ids=["causal_lm", "audio_lm with dropout"])
def test_gradient_checkpointing_gives_the_same_losses(
    model: dict[str, Any], units: Path, make_clips: Callable[..., Path], make_run: Any
) -> None:
    corpus = units if model is UNIT_LM else make_clips(20)
    plain, recomputed = (
        [line["loss"] for line in make_run(corpus, model, **changes).train()]
        for changes in ({}, {"train__gradient_checkpointing": True})
    )
    assert recomputed == pytest.approx(plain, rel=1e-6)


def test_freezing_leaves_frozen_weights_alone_and_moves_all_others(
    make_clips: Callable[..., Path], make_run: Any
) -> None:
    run = make_run(
        make_clips(20), AUDIO_LM, train__freeze=["model.audio_tower.*"], train__max_steps=3
    )
    before = run.weights()
    run.train()
    after = run.weights()
    for name, tensor in before.items():
        frozen = name.startswith("model.audio_tower.")
        assert torch.equal(tensor, after[name]) == frozen, name


# -- quarantine ----------------------------------------------------------------------------------


def spoil_step(prepared: Prepared, step: int) -> list[str]:
    """Overwrite every clip of one step after it was indexed; returns the examples' ids."""
    plan = prepared.plan
    planned = next(found for found in plan.steps(plan.start()) if found.step == step)
    examples = prepared.train.examples(np.concatenate(planned.lanes))
    for example in examples:
        for audio in example.audio():
            Path(audio.path).write_bytes(b"no audio")
    return [example.id for example in examples]


def test_a_step_whose_examples_are_all_unusable_moves_no_weight(
    make_clips: Callable[..., Path], make_run: Any
) -> None:
    spoilt: list[str] = []
    states: list[dict[str, torch.Tensor]] = []
    run = make_run(
        make_clips(60),
        AUDIO_LM,
        spoil=lambda prepared: spoilt.extend(spoil_step(prepared, 3)),
        progress=lambda line: states.append(run.weights()) if "loss" in line else None,
        data__max_quarantined=1.0,
        train__max_steps=4,
    )
    lines = run.train()
    moved = [
        any(not torch.equal(before[name], after[name]) for name in before)
        for before, after in pairwise(states)
    ]
    assert moved == [True, False, True]
    assert lines[2]["supervised_tokens"] == lines[2]["examples"] == 0
    named = {line["id"] for line in read_lines(run.job.folder / "quarantine.jsonl")}
    assert named == set(spoilt)
    assert ledger_ids(run.job.folder, 3) == []


def test_too_many_unusable_examples_end_the_run(
    make_clips: Callable[..., Path], make_run: Any
) -> None:
    run = make_run(
        make_clips(60),
        AUDIO_LM,
        spoil=lambda prepared: spoil_step(prepared, 2),
        data__max_quarantined=0.05,
    )
    with pytest.raises(UserError, match=r"data.max_quarantined: \d+ of 60 examples are unusable"):
        run.train()
    assert [line["step"] for line in read_lines(run.job.folder / "metrics.jsonl")] == [1]
