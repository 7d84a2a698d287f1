"""Bases, runs and plain references for the tests of adapters."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Qwen2AudioForConditionalGeneration,
    WhisperFeatureExtractor,
)

from raysft import worker
from raysft.config import Config
from raysft.data.clips.audio import load
from raysft.data.encode import make_encoder
from raysft.driver.preflight import Prepared, prepare
from raysft.export import export
from raysft.models import build
from raysft.parallel import World
from raysft.run.folder import open_run
from raysft.run.lines import read_lines
from raysft.train.job import Job
from raysft.train.loop import train
from tests.support.model_zoo import CONFIGS
from tests.support.models import AUDIO, CAUSAL

torch.set_num_threads(1)

STEPS, LANES, LR, CLIP, UNITS, VIRTUAL = 8, 2, 1e-2, 0.5, 20, 3
PEFT: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "alpha": 8},
    "qlora": {"r": 4, "alpha": 8},
    "adalora": {"r": 2, "alpha": 8, "init_r": 4, "tinit": 2, "tfinal": 2, "every": 2},
    "ia3": {},
    "prefix": {"virtual_tokens": VIRTUAL},
    "prompt": {"virtual_tokens": VIRTUAL},
}
CASES = [(method, "causal_lm") for method in PEFT]
CASES += [(method, "audio_lm") for method in ("lora", "adalora", "ia3")]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass
class Bench:
    """Bases with weights and their corpora, and runs over them."""

    folder: Path
    corpora: dict[str, Path]
    runs: dict[tuple[str, ...], Trained] = field(default_factory=dict)

    def base(self, name: str) -> Path:
        return self.folder / name

    def config(self, name: str, method: str, family: str, **changes: Any) -> Config:
        """changes: section__key=value; base: of another name than the family's."""
        base = changes.pop("base", base_of(method, family))
        tree: dict[str, dict[str, Any]] = {
            "run": {"name": name, "storage_path": str(self.folder / "runs"), "seed": 1},
            "data": {
                "train": [{"path": str(self.corpora[family])}],
                "lanes": LANES,
                "tokens_per_batch": 300,
                "window": 16,
                "mode": "padded" if method in ("prefix", "prompt") else "packed",
                "index_path": str(self.folder / "index"),
            },
            "model": {"path": str(self.base(base))},
            "peft": {"method": method, **PEFT.get(method, {})},
            "optim": {"lr": LR, "clip": CLIP},
            "train": {"max_steps": STEPS},
            "log": {"every": 1, "tensorboard": False},
            "checkpoint": {"every": 0, "keep": 100},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            tree.setdefault(section, {})[name] = value
        return Config.model_validate(tree)

    def start(self, config: Config) -> tuple[Job, Prepared]:
        folder = open_run(config)
        prepared = prepare(config, folder)
        data = worker.Data.in_process(
            config, prepared.encoder, folder, prepared.train, prepared.eval
        )
        return (
            worker.build_job(config, folder, World.current(), data, prepared.total_steps),
            prepared,
        )

    def run(self, config: Config) -> Trained:
        job, prepared = self.start(config)
        before = copy_of(job.strategy.module)
        train(job)
        return Trained(job, prepared, before)


@dataclass
class Trained:
    """A finished run, and what its parameters were before."""

    job: Job
    prepared: Prepared
    before: dict[str, torch.Tensor]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in read_lines(self.job.folder / "metrics.jsonl")]

    @property
    def trained(self) -> set[str]:
        return {n for n, p in self.job.strategy.module.named_parameters() if p.requires_grad}

    @property
    def last(self) -> Path:
        return self.job.folder / "checkpoints" / f"step_{self.job.total_steps}"

    @property
    def adapter(self) -> Any:
        return self.job.stream.speech_model


def base_of(method: str, family: str) -> str:
    """The base's name: in 4 bits go widths that every processor can compute."""
    return "wide" if method == "qlora" else family


def copy_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def make_bench(folder: Path, clips: Path) -> Bench:
    """Bases of a few layers: with and without units, tied, with experts, and one that hears."""
    items = [
        {"id": f"u{i}", "input": f"[Hu{i % UNITS}]" * (1 + i % 7), "output": f"text {i}"}
        for i in range(60)
    ]
    units = folder / "units.json"
    units.write_text(json.dumps(items))
    tied = copy.deepcopy(CAUSAL)
    tied["config"]["tie_word_embeddings"] = True
    audio = copy.deepcopy(AUDIO)
    audio["config"]["audio_config"]["dropout"] = 0.0
    wide = {**CAUSAL["config"], "hidden_size": 64, "head_dim": 32, "intermediate_size": 128}
    models = {
        "causal_lm": {**CAUSAL, "speech_units": UNITS},
        "wide": {**CAUSAL, "config": wide, "speech_units": UNITS},
        "unitless": CAUSAL,
        "tied": tied,
        "mixture": {**CAUSAL, "config": CONFIGS["qwen3_moe"], "speech_units": UNITS},
        "audio_lm": audio,
    }
    for name, model in models.items():
        config = Config.model_validate({"model": model})
        encoder = make_encoder(config.model, config.data, folder)
        export(build(config.model, config.data, encoder, 1), folder / name)
    return Bench(folder, {"causal_lm": units, "audio_lm": clips})


def plain_base(bench: Bench, method: str, family: str, base: str | None = None) -> Any:
    where = bench.base(base or base_of(method, family))
    if family == "audio_lm":
        return Qwen2AudioForConditionalGeneration.from_pretrained(where)
    settings = {}
    if method == "qlora":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(where, **settings)
    for module in model.modules():  # the layout that every processor knows
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def plain_settings(method: str, family: str) -> Any:
    inside = r"model\.language_model\..*\." if family == "audio_lm" else r".*\."
    linear = f"{inside}({'|'.join(LINEAR)})"
    if method in ("lora", "qlora"):
        return LoraConfig(r=4, lora_alpha=8, target_modules=linear)
    if method == "adalora":
        return AdaLoraConfig(
            target_r=2,
            init_r=4,
            lora_alpha=8,
            target_modules=linear,
            tinit=2,
            tfinal=2,
            deltaT=2,
            total_step=STEPS,
        )
    if method == "ia3":
        return IA3Config(
            target_modules=f"{inside}(k_proj|v_proj|down_proj)",
            feedforward_modules=f"{inside}down_proj",
        )
    kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    return kind(num_virtual_tokens=VIRTUAL, task_type="CAUSAL_LM")


def inputs_of(run: Trained, name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One example as transformers alone takes it, and its labels."""
    index, encoder = run.prepared.train, run.prepared.encoder
    example = next(e for e in index.examples(np.arange(len(index))) if e.id == name)
    clips = [load(audio.path, encoder.sample_rate) for audio in example.audio()]
    sequence = encoder.encode(example, clips)
    ids, labels = (torch.tensor(v).long() for v in (sequence.input_ids, sequence.labels))
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if clips:
        heard = WhisperFeatureExtractor(**AUDIO["feature_extractor"])(
            clips, sampling_rate=16000, return_attention_mask=True, return_tensors="pt"
        )
        inputs["input_features"] = heard["input_features"]
        inputs["feature_attention_mask"] = heard["attention_mask"]
    return inputs, labels


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[L, V] of a plain model on one example, without the logits of virtual positions."""
    return model(**inputs, use_cache=False).logits[0][-inputs["input_ids"].shape[1] :]


def step_ids(run: Trained, step: int) -> list[str]:
    found = []
    for lane in range(LANES):
        lines = read_lines(run.job.folder / "ledger" / f"lane_{lane}_from_1.jsonl")
        found += [name for line in lines if line["step"] == step for name in line["ids"]]
    return found


def same_logits(mine: Any, plain: Any, run: Trained) -> None:
    """Two models say the same to some examples, and what they say differs by example."""
    said = []
    for name in step_ids(run, 1)[:3]:
        inputs, _ = inputs_of(run, name)
        with torch.no_grad():
            pair = [logits_of(model.eval(), inputs) for model in (mine, plain)]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)
        said.append(pair[0][-1])
    assert not torch.equal(said[0], said[1])


def tables(net: Any) -> list[torch.Tensor]:
    return [e.weight.detach() for e in (net.get_input_embeddings(), net.get_output_embeddings())]


def build_only(bench: Bench, config: Config) -> None:
    encoder = make_encoder(config.model, config.data, bench.folder)
    worker.build_model(config, encoder, STEPS)
