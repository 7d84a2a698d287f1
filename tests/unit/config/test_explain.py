"""Wrong keys and values: one mistake each, in words; others' names are answered with ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raysft.cli import parse
from raysft.config import aliases, load_config
from raysft.config.load import all_keys
from raysft.errors import UserError

FOREIGN = {
    "learning_rate": "optim.lr",
    "num_train_epochs": "train.epochs",
    "max_train_steps": "train.max_steps",
    "per_device_train_batch_size": "data.tokens_per_batch",
    "max_frames_in_batch": "data.tokens_per_batch",
    "gradient_accumulation_steps": "data.lanes",
    "lora_r": "peft.r",
    "lora_alpha": "peft.alpha",
    "lora_dropout": "peft.dropout",
    "asr_tts_mix_ratio": "data.mix",
    "output_dir": "run.storage_path",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "deepspeed": "parallel.strategy",
    "max_grad_norm": "optim.clip",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "lr_scheduler_type": "optim.schedule",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "evaluate.every",
    "logging_steps": "log.every",
    "model_name_or_path": "model.path",
    "train_asr_dirs": "data.train",
    "ignore_optimizer_state": "checkpoint.resume",
    "weight_decay": "optim.weight_decay",
    "seed": "run.seed",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "adam_beta2": "optim.betas",
    "Learning-Rate": "optim.lr",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "a.yaml"
    file.write_text("data: {train: [t.jsonl]}\nmodel: {path: base}\n")
    return file


def said(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(("name", "key"), FOREIGN.items())
def test_names_of_other_trainers_are_answered_with_our_key(path: Path, name: str, key: str) -> None:
    for section in ("", "train.", "optim."):
        if f"{section}{name}" == key:
            continue
        assert f"{name}: unknown key; did you mean {key}?" in said(path, f"{section}{name}=1")
    with pytest.raises(UserError, match=rf"--{name}: keys are given as key=value here: {key}=3"):
        parse(["a.yaml", f"--{name}", "3"], "usage", 1)
    with pytest.raises(UserError, match=rf"--{name}: keys are given as key=value here: {key}=3"):
        parse(["a.yaml", f"--{name}=3"], "usage", 1)


def test_every_name_is_answered_with_a_key_there_is_and_is_none_of_ours() -> None:
    keys = {key for key in all_keys() if "[]" not in key} | {"data.train", "data.eval"}
    for name, key in aliases.names().items():
        assert key in keys, name
        assert name not in keys


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.schedule=constant_with_warmup", "; write constant, with optim.warmup"),
        ("optim.schedule=warmup_stable_decay", "; write wsd"),
        ("optim.optimizer=adamw_torch", "; write adamw"),
        ("train.precision=bfloat16", "; write bf16"),
        ("parallel.strategy=zero-2", "; write zero2"),
        ("peft.method=full", "; write none"),
        ("checkpoint.resume=true", "; write auto"),
    ],
)
def test_values_of_other_trainers_are_answered_with_ours(
    path: Path, override: str, says: str
) -> None:
    assert said(path, override).endswith(says)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.tokens_per_batch=x", "a whole number greater than 0, or 'auto', found 'x'"),
        ("data.tokens_per_batch=[1]", "a whole number greater than 0, or 'auto', found [1]"),
        ("data.lanes=2.5", "a whole number greater than 0, found 2.5"),
        ("data.lanes='3'", "a whole number greater than 0, found '3'; write the number without"),
        ("log.every=true", "a whole number greater than 0, found true"),
        ("peft.target_modules=3", "a text or a list of texts, found 3; a text that reads as ano"),
        ("peft.target_modules=[1, q]", "a text or a list of texts, found [1, 'q']"),
        ("optim.betas=[0.9]", "a list of 2 numbers, found [0.9]"),
        ("optim.betas=0.9", "a list of 2 numbers, found 0.9"),
        ("parallel.workers=two", "a whole number of at least 1, or two of them as [min, max]"),
        ("train.compile=1", "true or false, found 1"),
        ("data.max_quarantined=2", "a number of at least 0 and at most 1, found 2"),
        ("data.max_seconds=x", "a number greater than 0, or null, found 'x'"),
        ("data.mix=0.5", "keys below it, each with a number greater than 0, found 0.5"),
        ("data.mix={no: 1}", "texts as keys below it, found false; put it into quotes"),
        ("data.prompts={asr: 3}", "a text, found 3; a text that reads as another value needs quo"),
        ("data.train=3", "a list of entries, found 3"),
        ("data.train=[3]", "keys below it, found 3; there are path, format, task"),
        ("data.speech_tokens=100", "keys below it, found 100; there are method, clusters"),
        ("evaluate.every=null", "a whole number of at least 0, found null"),
        ("optim=adamw", "keys below it, found 'adamw'; there are optimizer, lr"),
        ("model.config=qwen3", "keys below it, or null, found 'qwen3'"),
        ("optim.lr=.nan", "a number greater than 0, found nan"),
    ],
)
def test_a_wrong_type_is_one_mistake_in_words(path: Path, override: str, says: str) -> None:
    text = said(path, override)
    assert "mistakes" not in text
    assert f": expected {says}" in text
    assert not {"Input should", "valid", "type=", "constrained", "literal"} & set(text.split())


def test_a_key_in_the_wrong_section_is_led_to_its_own(path: Path) -> None:
    assert said(path, "train.lr=1") == "train.lr: unknown key; did you mean optim.lr?"
    assert said(path, "optim.schedul=linear").endswith("did you mean optim.schedule?")
    assert said(path, "seeed=1").endswith("did you mean run.seed?")
    assert "known here: name, storage_path, seed" in said(path, "run.zzzzzz=1")


def test_a_job_without_arguments_prints_its_usage() -> None:
    done = subprocess.run([sys.executable, "jobs/sft.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "python jobs/sft.py CONFIG.yaml" in done.stderr
    assert "error" not in done.stderr


def test_unknown_options_name_the_nearest_and_missing_arguments_the_usage() -> None:
    with pytest.raises(UserError, match=r"--dryrun: unknown option; did you mean --dry-run\?"):
        parse(["a.yaml", "--dryrun"], "usage", 1, flags=["dry-run"])
    with pytest.raises(UserError, match="-c: unknown option; there are --debug, --help"):
        parse(["a.yaml", "-c", "x"], "usage", 1)
    with pytest.raises(UserError, match="1 of 2 arguments are given\nusage: RUN OUT"):
        parse(["run"], "usage: RUN OUT", 2)
