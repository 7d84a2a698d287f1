"""A run keeps its prompts: on another day, beside another model, and in what is read of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import AddedToken

from raysft.config import Config, load_config
from raysft.data.encode import TEMPLATE
from raysft.data.plan.plan import Cursor
from raysft.data.text import byte_tokenizer
from raysft.driver.preflight import Prepared, prepare, read_eval
from raysft.errors import UserError
from raysft.run.folder import open_run
from tests.support.models import CAUSAL

DATED = (
    "<|start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|end|>{% for m in messages %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
YESTERDAY, TODAY = "Etc/GMT+12", "Pacific/Kiritimati"  # never of one date


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield zone
    monkeypatch.undo()
    time.tzset()


def config(folder: Path, name: str = "dated", template: str = DATED) -> Config:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, normalized=False) for t in TOKENS]}
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "tokenizer")
    items = [
        {"id": f"t{i}", "instruction": "repeat", "input": word, "output": word}
        for i, word in enumerate(("one", "two", "three", "four") * 4)
    ]
    (folder / "train.json").write_text(json.dumps(items))
    tree = {
        "run": {"name": name, "storage_path": str(folder / "runs")},
        "data": {"train": [str(folder / "train.json")], "lanes": 2, "tokens_per_batch": 300},
        "model": {**CAUSAL, "tokenizer": str(folder / "tokenizer")},
        "train": {"max_steps": 4},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return load_config(folder / f"{name}.yaml", [])


TOKENS = ("<|start|>", "<|end|>")


def with_eval(settings: Config) -> Config:
    return settings.model_copy(
        update={"data": settings.data.model_copy(update={"eval": settings.data.train})}
    )


def prompt(prepared: Prepared) -> str:
    (example,) = prepared.train.examples([0])
    return prepared.encoder.tokenizer.decode(prepared.encoder.prompt(example, []).input_ids)


def cursor(prepared: Prepared) -> Cursor:
    """After the first step."""
    return next(iter(prepared.plan.steps(prepared.plan.start()))).after


def test_a_run_goes_on_the_next_day_with_the_prompts_it_began_with(tmp_path: Path, clock) -> None:
    settings = config(tmp_path)
    run = open_run(settings)
    clock(YESTERDAY)
    day = time.strftime("%d %b %Y")
    first = prepare(settings, run)
    assert f"Today is {day}." in prompt(first)
    clock(TODAY)
    assert time.strftime("%d %b %Y") != day
    again = prepare(settings, run, cursor(first))
    assert prompt(again) == prompt(first)
    assert again.train.folder == first.train.folder, "and its data is not indexed anew"
    evaluated, _ = read_eval(with_eval(settings), run, tmp_path / "evaluation")
    assert evaluated.fingerprint == first.encoder.fingerprint
    other = prepare(config(tmp_path, "later"), open_run(config(tmp_path, "later")))
    assert time.strftime("%d %b %Y") in prompt(other)


def test_two_runs_of_one_day_share_their_index(tmp_path: Path) -> None:
    made = []
    for name in ("one", "other"):
        settings = config(tmp_path, name)
        made.append(prepare(settings, open_run(settings)).train.folder)
    assert made[0] == made[1]


def test_a_template_that_changes_in_the_models_folder_does_not_change_the_run(
    tmp_path: Path,
) -> None:
    settings = config(tmp_path)
    run = open_run(settings)
    first = prepare(settings, run)
    changed = DATED.replace("Today is", "It is")
    again = prepare(config(tmp_path, template=changed), run, cursor(first))
    assert prompt(again) == prompt(first)


def test_a_template_mended_before_anything_was_saved_is_the_one_that_is_used(
    tmp_path: Path,
) -> None:
    settings = config(tmp_path)
    prepare(settings, open_run(settings))
    changed = DATED.replace("Today is", "It is")
    mended = config(tmp_path, template=changed)
    assert "It is" in prompt(prepare(mended, open_run(mended)))
    assert "It is" in (tmp_path / "runs" / "dated" / TEMPLATE).read_text()


def test_an_evaluation_leaves_out_what_is_longer_than_the_positions_a_model_has_learned(
    tmp_path: Path,
) -> None:
    settings = config(tmp_path)
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 90}
    model = settings.model.model_copy(update={"config": gpt2})
    settings = settings.model_copy(update={"model": model})
    run = open_run(settings)
    prepare(settings, run)
    long = [{"id": "long", "instruction": "repeat", "input": "a" * 200, "output": "b"}]
    items = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(items + long))
    _, index = read_eval(with_eval(settings), run, tmp_path / "evaluation")
    (rejected,) = index.rejected
    assert rejected.id == "long" and "learned 90" in rejected.reason


def test_a_run_of_before_prompts_were_kept_is_refused_with_the_choices(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = open_run(settings)
    first = prepare(settings, run)
    (run / TEMPLATE).unlink()
    said = r"no chat_template\.jinja: .*an earlier raysft.*checkpoint\.resume=weights_only"
    with pytest.raises(UserError, match=said):
        prepare(settings, run, cursor(first))
    with pytest.raises(UserError, match=said):
        read_eval(with_eval(settings), run, tmp_path / "evaluation")
    prepare(settings, run)  # without a checkpoint it begins at its first step, under these prompts
    assert (run / TEMPLATE).is_file()


def test_a_prompt_that_no_conversation_begins_with_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asks = DATED.replace("<|start|>assistant\n{% endif %}", "<|start|>assistant\nHm. {% endif %}")
    settings = config(tmp_path, template=asks)
    prepare(settings, open_run(settings))
    assert "data.template: the chat template asks with a prompt that ends in" in caplog.text
