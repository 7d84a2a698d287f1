"""The languages that examples name, in the index: whose, from where, and what they change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raysft.config.schema import Data
from raysft.data.example import Example
from raysft.data.index.build import Index
from raysft.data.plan.plan import Plan
from raysft.errors import UserError
from tests.support.generations import Run
from tests.support.indexes import asr, build, clip, jsonl

LANGS = ["de", None, "en", "", "de", "zu", "en", "de", None, "en", "de", "sw"]
BY_LANG = Data(lanes=2, tokens_per_batch=200, window=8, temperature={"T": 2.0, "by": "lang"})
PLAIN = BY_LANG.model_copy(update={"temperature": None})


def corpus(folder: Path, langs: list[str | None], name: str = "t", first: int = 0) -> Path:
    if not (folder / "a.wav").exists():
        clip(folder / "a.wav")
    records = [
        asr(id=f"c{first + number}", task_type=("asr", "tts")[number % 2])
        | ({} if lang is None else {"lang": lang})
        for number, lang in enumerate(langs)
    ]
    return jsonl(folder / f"{name}.jsonl", records)


def languages(index: Index) -> list[str]:
    names, column = index.languages
    return [names[number] for number in column]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_an_example_has_the_language_of_its_record_or_none(tmp_path: Path) -> None:
    one, two = corpus(tmp_path, LANGS), corpus(tmp_path, ["xh", "de", None], "u", first=50)
    index = build(tmp_path / "i", one, two)
    assert languages(index) == [lang or "" for lang in [*LANGS, "xh", "de", None]]
    assert index.languages[0] == ["", "de", "en", "sw", "xh", "zu"]


def test_the_languages_are_those_of_examples_that_can_be_used(tmp_path: Path) -> None:
    file = corpus(tmp_path, ["de", "en"])
    with file.open("a") as stream:
        stream.write(json.dumps(asr("gone.wav", lang="fr")) + "\n")
    index = build(tmp_path / "i", file)
    assert len(index.rejected) == 1
    assert index.languages[0] == ["de", "en"]


def test_lines_that_come_and_go_have_their_languages(tmp_path: Path, small_chunks: None) -> None:
    many = LANGS * 8
    for some in (many[:40], many, many[7:], ["fr", *many], ["en"]):
        index = build(tmp_path / "i", corpus(tmp_path, some))
        assert languages(index) == [lang or "" for lang in some]
        assert index.languages[0] == sorted({lang or "" for lang in some})


def test_an_index_of_before_is_refused_where_languages_count(tmp_path: Path) -> None:
    built = build(tmp_path / "i", corpus(tmp_path, LANGS))
    before = Plan.of(built, PLAIN, 0)
    meta = json.loads((built.folder / "meta.json").read_text())
    del meta["langs"]
    (built.folder / "meta.json").write_text(json.dumps(meta))
    (built.folder / "lang.npy").unlink()
    old = Index.load(built.folder)
    assert Plan.of(old, PLAIN, 0).hash == before.hash
    with pytest.raises(UserError, match=r"temperature.by: lang: .*start the job again to rebuild"):
        Plan.of(old, BY_LANG, 0)


def test_a_language_is_no_part_of_the_indexs_hash_but_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = corpus(tmp_path, LANGS)
    one = build(tmp_path / "i", file)
    # As a raysft that reads the field otherwise would: as many of the same names.
    told = {"de": "en", "en": "de"}
    own = Example.counted.fget
    monkeypatch.setattr(Example, "counted", property(lambda e: told.get(own(e), own(e))))
    other = build(tmp_path / "j", file)
    assert one.hash == other.hash and one.folder.name != other.folder.name
    assert languages(one) != languages(other)
    assert Plan.of(one, PLAIN, 0).hash == Plan.of(other, PLAIN, 0).hash
    assert Plan.of(one, BY_LANG, 0).hash != Plan.of(other, BY_LANG, 0).hash


def start(run: Run, *files: Path, **more: object) -> None:
    run.start(*files, tokens_per_batch=200, temperature={"T": 2.0, "by": "lang"}, **more)


def test_a_run_goes_on_and_counts_what_joins_from_the_next_epoch_on(
    run: Run, tmp_path: Path
) -> None:
    few = ["de"] * 16 + ["zu"] * 4
    file = corpus(tmp_path, few)
    start(run, file)
    run.train(2)
    written = run.written()
    start(run, file)
    assert run.written() == written
    run.epoch()
    seen = run.epoch()  # a whole epoch: 16^(1/2) to 4^(1/2)
    zu = {f"c{number}" for number in range(16, 20)}
    assert (sum(name in zu for name in seen), len(seen)) == (8, 24)
    start(run, corpus(tmp_path, [*few, "sw"]), extend=True)
    run.epoch()
    seen = run.epoch()
    assert seen.count("c20") == 4  # 1^(1/2) of 16^(1/2), of which each is seen once
    assert (sum(name in zu for name in seen), len(seen)) == (8, 28)
    assert len(run.written()) == 2


def test_languages_that_are_read_otherwise_leave_a_run_as_it_was_planned(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = corpus(tmp_path, LANGS * 4)
    start(run, file)
    run.train(2)
    planned = run.written()
    monkeypatch.setattr(Example, "counted", property(lambda example: "de"))
    run.cache = tmp_path / "index2"  # nothing is known there: all is measured anew
    start(run, file)
    assert "what they hold is not: the languages of its examples are others" in caplog.text
    assert run.written() == planned
    assert np.sum([len(step) for step in run.train(3)]) > 0
