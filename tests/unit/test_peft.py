"""Adapters against plain torch and plain peft: losses, files, resume, export, refusals."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Qwen2AudioForConditionalGeneration,
    WhisperFeatureExtractor,
)

from raysft import worker
from raysft.config import Config, to_yaml
from raysft.data.audio import load
from raysft.data.encode import make_encoder
from raysft.errors import UserError
from raysft.export import export, export_run
from raysft.models import PREFIX, build
from raysft.parallel import World
from raysft.prepare import Prepared, prepare
from raysft.rundir import open_run
from raysft.train.loop import Job, train
from raysft.train.metrics import read_lines
from tests import worlds
from tests.models import AUDIO, CAUSAL
from tests.unit.model_zoo import CONFIGS

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

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
        base = changes.pop("base", family)
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
        return self.job.stream.adapter


def copy_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.fixture(scope="module")
def bench(make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("peft")
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
    models = {
        "causal_lm": {**CAUSAL, "speech_units": UNITS},
        "unitless": CAUSAL,
        "tied": tied,
        "mixture": {**CAUSAL, "config": CONFIGS["qwen3_moe"], "speech_units": UNITS},
        "audio_lm": audio,
    }
    for name, model in models.items():
        config = Config.model_validate({"model": model})
        encoder = make_encoder(config.model, config.data, folder)
        export(build(config.model, config.data, encoder, 1), folder / name)
    return Bench(folder, {"causal_lm": units, "audio_lm": make_clips(40)})


# -- the losses of a plain loop ------------------------------------------------------------------


def plain_base(bench: Bench, method: str, family: str, base: str | None = None) -> Any:
    where = bench.base(base or family)
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
    return AutoModelForCausalLM.from_pretrained(where, **settings)


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


def test_the_adapter_in_a_checkpoint_loads_in_plain_peft(case: Any, bench: Bench) -> None:
    method, family, run = case
    base = plain_base(bench, method, family)
    plain = PeftModel.from_pretrained(base, run.last / "adapter")
    same_logits(run.adapter.model, plain, run)
    settings = json.loads((run.last / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(bench.base(family))
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
        mine = PeftModel.from_pretrained(plain_base(bench, "lora", family), run.last / "adapter")
    same_logits(mine, merged, run)


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


# -- rows of new tokens --------------------------------------------------------------------------


def tables(net: Any) -> list[torch.Tensor]:
    return [e.weight.detach() for e in (net.get_input_embeddings(), net.get_output_embeddings())]


@pytest.mark.parametrize("base", ["unitless", "tied"])
@pytest.mark.parametrize("method", ["lora", "adalora"])
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


@pytest.mark.parametrize("method, family", [*CASES[:1], *CASES[2:7]])
def test_bf16_stores_frozen_matrices_in_it_and_adapters_in_float32(
    method: str, family: str, bench: Bench
) -> None:
    changes = {"train__max_steps": 6}
    run = bench.run(
        bench.config(f"half_{method}_{family}", method, family, train__precision="bf16", **changes)
    )
    exact = bench.run(bench.config(f"exact_{method}_{family}", method, family, **changes)).losses
    assert run.losses == pytest.approx(exact, rel=0.01)
    assert run.losses != exact
    for name, p in run.job.strategy.module.named_parameters():
        half = p.ndim > 1 and name not in run.trained and "ranknum" not in name
        assert p.dtype == (torch.bfloat16 if half else torch.float32), name


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
    "method, family", [("lora", "audio_lm"), ("prefix", "causal_lm"), ("prompt", "causal_lm")]
)
def test_batched_answers_are_those_of_plain_peft_one_by_one(
    method: str, family: str, bench: Bench
) -> None:
    run = bench.run(
        bench.config(
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
    )
    job, _ = bench.start(run.job.config)
    scores = worker.evaluate_checkpoint(job)
    assert {"wer/heard", "loss/asr"} <= scores.keys()
    lines = read_lines(job.folder / "predictions" / f"step_{STEPS}.jsonl")
    said = {line["id"]: line["hypothesis"] for line in lines}
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
        ({"peft__path": "/nowhere/at/all"}, "neither a folder nor on the hub"),
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


def build_only(bench: Bench, config: Config) -> None:
    encoder = make_encoder(config.model, config.data, bench.folder)
    worker.build_model(config, encoder, STEPS)


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


def test_an_adapter_without_a_base_is_not_exported(bench: Bench, tmp_path: Path) -> None:
    config = bench.config("baseless", "lora", "causal_lm").model_dump()
    config["model"] = Config.model_validate({"model": {**CAUSAL, "speech_units": UNITS}}).model
    run = bench.run(Config.model_validate(config))
    with pytest.raises(UserError, match=r"made from model.config; .* --merge"):
        export_run(run.job.folder, tmp_path / "adapter")
    export_run(run.job.folder, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    same_logits(run.adapter.model, merged, run)
