"""Text that becomes the unknown token is said before it is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raysft.config.schema import Data, Model, Source
from raysft.data.encode import make_encoder
from raysft.data.index.build import build_index
from raysft.driver.unknown import unknown_text
from tests.cluster.conftest import ROOT
from tests.support.models import CAUSAL

DIGITS = str(ROOT / "examples" / "spoken_digits" / "tokenizer")


def said(folder: Path, tokenizer: str, items: list[dict[str, Any]]) -> list[str]:
    """What is said of MoST items under a tokenizer."""
    path = folder / "items.json"
    path.write_text(json.dumps(items))
    model = Model.model_validate({**CAUSAL, "tokenizer": tokenizer})
    encoder = make_encoder(model, Data(), folder)
    return unknown_text(encoder, build_index([Source(path=str(path))], "train", encoder, folder))


def item(number: int, answer: str, asked: str = "two") -> dict[str, Any]:
    return {"id": f"i{number}", "instruction": asked, "input": "one", "output": answer}


def test_answers_and_prompts_with_unknown_words_are_counted_and_the_first_is_named(
    tmp_path: Path,
) -> None:
    items = [item(0, "one"), item(1, "one nineteen"), item(2, "twenty"), item(3, "two", "Listen.")]
    answers, prompts = said(tmp_path, DIGITS, items)
    assert answers.startswith("2 of 4 answers looked at hold text that the tokenizer does not know")
    assert "(<unk>)" in answers and "first i1, 'one nineteen'" in answers
    assert prompts.startswith("1 of 4 prompts looked at") and "first i3" in prompts


@pytest.mark.parametrize("tokenizer", [DIGITS, "bytes"])
def test_nothing_is_said_of_text_that_is_known(tokenizer: str, tmp_path: Path) -> None:
    assert not said(tmp_path, tokenizer, [item(0, "one two"), item(1, "three")])


def test_a_tokenizer_that_knows_all_bytes_knows_all_words(tmp_path: Path) -> None:
    assert not said(tmp_path, "bytes", [item(0, "nineteen \u8a13"), item(1, "x", "\U0001f600")])


def test_of_a_large_index_some_are_looked_at(tmp_path: Path) -> None:
    items = [item(number, "one" if number % 2 else "eleven") for number in range(1000)]
    (answers,) = said(tmp_path, DIGITS, items)
    assert " of 256 answers looked at" in answers
