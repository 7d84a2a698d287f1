"""Promises of the config: numbers are numbers, every mistake is named, help shows every key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raysft.config import changed_keys, load_config, to_yaml
from raysft.config.load import all_keys, describe
from raysft.errors import UserError

SMALL = """
data:
  train: [train.jsonl, {path: more.jsonl, weight: 2}]
model:
  config: {model_type: qwen3, hidden_size: 64}
  tokenizer: bytes
optim: {lr: 1e-4, eps: 1.0e-9}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    return str(error.value)


def test_numbers_in_exponent_form_are_numbers(path: Path) -> None:
    config = load_config(path, ["optim.weight_decay=1E-2"])
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (1e-4, 1e-9, 0.01)


def test_a_source_may_be_a_plain_path(path: Path) -> None:
    first, second = load_config(path).data.train
    assert (first.path, first.format, second.weight) == (f"{Path.cwd()}/train.jsonl", "auto", 2)


def test_overrides_reach_lists_and_nested_keys_and_are_yaml(path: Path) -> None:
    config = load_config(
        path,
        [
            "optim.betas=[0.9, 0.98]",
            "model.config.hidden_size=128",
            "data.train.0.task=asr",
            "data.mix={asr: 0.25, tts: 0.75}",
            "data.speech_tokens.clusters=50",
            "train.max_steps=null",
        ],
    )
    assert config.optim.betas == [0.9, 0.98]
    assert config.model.config == {"model_type": "qwen3", "hidden_size": 128}
    assert config.data.train[0].task == "asr"
    assert config.data.mix == {"asr": 0.25, "tts": 0.75}
    assert config.data.speech_tokens is not None and config.data.speech_tokens.clusters == 50


@pytest.mark.parametrize(
    ("value", "least", "most"), [("3", 3, 3), ("[1, 4]", 1, 4), ("[2, 2]", 2, 2)]
)
def test_workers_are_a_number_or_a_range_that_is_elastic_if_it_holds_more_than_one(
    value: str, least: int, most: int, path: Path
) -> None:
    parallel = load_config(path, [f"parallel.workers={value}"]).parallel
    assert (parallel.min_workers, parallel.max_workers) == (least, most)
    assert parallel.elastic == (least < most)


def test_all_mistakes_are_reported_together_with_key_value_and_remedy(path: Path) -> None:
    text = error_of(
        path,
        "optim.schedul=linear",
        "data.mode=sorted",
        "data.lanes=two",
        "lanes=4",
        "parallel.workers=9",
        "optim.lr='1e-4'",
    )
    assert "optim.schedul: unknown key; did you mean optim.schedule?" in text
    assert "data.mode: expected 'packed' or 'padded', found 'sorted'" in text
    assert "data.lanes: expected a whole number greater than 0, found 'two'" in text
    assert "lanes: unknown key; did you mean data.lanes?" in text
    assert "parallel.workers: 9 workers share data.lanes: 8" in text
    assert (
        "optim.lr: expected a number greater than 0, found '1e-4'; write the number without" in text
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.path=some/model", "both are given: set model.path"),
        ("model.tokenizer=null", "model.tokenizer: needed with model.config"),
        ("data.train=[]", "data.train: empty"),
        (
            "evaluate.every=5",
            "evaluate.every: 5, but data.eval names no source; name one (data.eval=[dev.jsonl])",
        ),
        ("checkpoint.best=wer/dev", "checkpoint.best: nothing measures it while training; set"),
        ("checkpoint.resume=always", "checkpoint.resume: expected 'auto', 'weights_only' or 'nev"),
        ("checkpoint.keep=0", "checkpoint.keep: expected a whole number greater than 0, found 0"),
        ("checkpoint.grace_s=0", "checkpoint.grace_s: expected a number greater than 0, found 0"),
        ("parallel.timeout_s=0", "parallel.timeout_s: expected a number greater than 0, found 0"),
        ("parallel.backoff_s=-1", "parallel.backoff_s: expected a number of at least 0"),
        (
            "parallel.max_failures=-2",
            "parallel.max_failures: expected a whole number of at least -1",
        ),
        ("parallel.workers=0", "parallel.workers: expected a whole number of at least 1, or two"),
        ("parallel.workers=true", "parallel.workers: expected a whole number of at least 1, or"),
        ("parallel.workers=[1, 2, 3]", "parallel.workers: expected a whole number of at least 1"),
        ("parallel.workers=[3, 1]", "parallel.workers: expected [min, max] with min no larger"),
        ("parallel.workers=[1, 9]", "parallel.workers: "),
        ("run.name=../x", "run.name: '../x' is not a plain folder name"),
        ("run=3", "run: expected keys below it, found 3"),
        ("optim.lr", "expected key=value"),
        ("data.train.7.task=asr", "'7' is none of its positions 0..1"),
        ("optim.lr.x=3", "optim.lr is a value, it has no keys"),
        ("optim.lr=[1", "optim.lr: not valid YAML"),
    ],
)
def test_contradictions_and_bad_overrides_are_one_clear_line(
    path: Path, override: str, said: str
) -> None:
    text = error_of(path, override)
    assert said in text
    assert "\n" not in text


def test_missing_and_broken_files_are_named(tmp_path: Path, path: Path) -> None:
    assert "no such config file; did you mean" in error_of(tmp_path / "smal.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("data: [1\n")
    assert f"{broken}: not valid YAML" in error_of(broken)
    twice = tmp_path / "twice.yaml"
    twice.write_text("optim: {lr: 1, lr: 2}\n")
    assert "'lr' is given twice" in error_of(twice)


def test_the_resolved_config_reads_back_as_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["data.mix={asr: 1}"])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config


def test_help_names_every_key_with_type_default_and_meaning() -> None:
    text = describe()
    for key in all_keys():
        assert f"  {key} (" in text, key
    assert "  optim.lr (float; default 1e-05)\n      peak learning rate" in text
    assert "None" not in text


def test_changed_keys_are_dotted_and_show_both_values(path: Path) -> None:
    old = yaml.safe_load(to_yaml(load_config(path)))
    new = yaml.safe_load(to_yaml(load_config(path, ["optim.lr=3e-4"])))
    assert [str(change) for change in changed_keys(old, new)] == [
        "optim.lr (was 0.0001, now 0.0003)"
    ]
