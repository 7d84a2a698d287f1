"""What examples are called: no two alike, short where nothing is in the way, for ever the same."""

from __future__ import annotations

import itertools
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft.audit import audit
from raysft.config import Config
from raysft.config.schema import Data, Source
from raysft.data import names
from raysft.data.index.table import Index
from raysft.data.names import labels, name_of, repeated
from raysft.data.plan.generations import open_index
from raysft.parallel import World
from raysft.run import plans
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support.indexes import asr, build, clip, jsonl
from tests.support.models import AUDIO
from tests.support.worlds import start


def called(index: Index) -> list[str]:
    return index.ids(np.arange(len(index)))


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/d/train.jsonl"], ["train"]),
        (["/d/en/train.jsonl", "/d/de/train.jsonl"], ["en/train", "de/train"]),
        (["/d/en/a/x.json", "/d/de/a/x.json", "/d/y.json"], ["en/a/x", "de/a/x", "y"]),
        (["/d/x.json", "/d/x.jsonl", "/e/x.json"], ["x.json", "x.jsonl", "e/x"]),
        (["/x.json", "/x.jsonl"], ["x.json", "x.jsonl"]),
        (["/d/a@b.json", "/d/100%.json"], ["a%40b", "100%25"]),
        (["/x.json", "/d/x.json"], ["x.json", "d/x"]),
    ],
)
def test_a_file_is_called_by_as_much_of_its_path_as_tells_it_apart(
    paths: list[str], expected: list[str]
) -> None:
    entries = [(path, f"s{number}") for number, path in enumerate(paths)]
    assert labels(entries) == expected
    assert names.named(paths, names.naming(entries, expected)) == expected


def test_a_file_that_two_sources_read_is_called_by_their_names_too() -> None:
    entries = [("/d/a.json", "asr"), ("/d/a.json", "tts"), ("/d/b.json", "b")]
    assert labels(entries) == ["a[asr]", "a[tts]", "b"]


def test_files_keep_their_labels_when_others_join_and_no_other_gets_them() -> None:
    before = {("/d/en/train.jsonl", "en"): "train"}
    both = [("/d/de/train.jsonl", "de"), ("/d/en/train.jsonl", "en")]
    assert labels(both, before) == ["de/train", "train"]
    assert labels(both[:1], before) == ["de/train"]  # not `train`, though it is alone now
    assert labels([("/d/train'.json", "x")], {("/e/a.json", "a"): "train'"}) == ["train''"]


def test_no_two_labels_are_alike_whatever_files_are_called() -> None:
    rng = np.random.default_rng(0)
    pieces = ["a", "b", "a[s0]", "a[s0]'", "a.json", "x@y", "%40", "a:1"]
    for _ in range(200):
        paths = {
            "/" + "/".join(rng.choice(pieces, rng.integers(1, 4))) + rng.choice(["", ".json", ".x"])
            for _ in range(12)
        }
        entries = [(path, f"s{i}") for path in sorted(paths) for i in range(rng.integers(1, 3))]
        assert len(set(labels(entries))) == len(entries)


def test_no_two_names_are_alike_whatever_ids_say() -> None:
    files = [f"/{folder}/{name}" for folder in "ab" for name in ("t.json", "u@t.json")]
    known = labels([(file, "s") for file in files])
    nasty = ["", "t:1", "a/t:1", "a/t:2", "x", "x@a/t:1", "x@a/t:2", "a/t:01", "u%40t:1", "é"]
    rng = np.random.default_rng(1)
    for _ in range(300):
        ids = [str(rng.choice(nasty)) for _ in range(24)]
        places = [(file, line) for file in range(len(files)) for line in range(1, 7)]
        defaults = [f"{Path(files[file]).stem}:{line}" for file, line in places]
        ids = [one or default for one, default in zip(ids, defaults)]
        hashes = [0 if one == own else names.hashed(one) for one, own in zip(ids, defaults)]
        again = repeated(np.array(hashes, np.uint64))
        found = [
            name_of(one, own, f"{known[file]}:{line}", bool(twice), frozenset(known))
            for one, own, (file, line), twice in zip(ids, defaults, places, again)
        ]
        assert len(set(found)) == len(found), sorted(found)


def test_repeated_ids_are_found_by_their_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_ROWS", 7)
    rng = np.random.default_rng(2)
    for size in (0, 1, 2, 50):
        hashes = rng.integers(0, 40, size).astype(np.uint64) << np.uint64(57)
        expected = [value != 0 and (hashes == value).sum() > 1 for value in hashes]
        assert repeated(hashes).tolist() == expected


def test_files_of_one_name_share_no_name_of_an_example(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wav = str(clip(tmp_path / "a.wav"))
    lines = [asr(wav), "{broken", asr("missing.wav"), asr(wav, id="own")]
    first, second = (jsonl(tmp_path / lang / "train.jsonl", lines[:3]) for lang in ("en", "de"))
    third = jsonl(tmp_path / "other.jsonl", lines)
    index = build(tmp_path / "i", first, second, third)
    assert called(index) == ["en/train:1", "de/train:1", "other:1", "own"]
    refused = [found.id for found in index.rejected]
    assert refused == [f"{name}:{i}" for name in ("en/train", "de/train", "other") for i in (2, 3)]
    assert not caplog.messages
    again = pickle.loads(pickle.dumps(index))
    assert called(again) == called(index)
    alone = build(tmp_path / "i", first)
    assert called(alone) == ["train:1"]  # as ever


def test_ids_that_are_there_twice_are_said_with_both_places_and_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wav = str(clip(tmp_path / "a.wav"))
    first = jsonl(tmp_path / "a.jsonl", [asr(wav, id="x"), asr(wav), asr(wav, id="y")])
    second = jsonl(tmp_path / "b.jsonl", [asr("no.wav", id="y"), asr(wav, id="x"), asr(wav, id=7)])
    index = build(tmp_path / "i", first, second)
    assert called(index) == ["x@a:1", "a:2", "y@a:3", "x@b:2", "7"]
    assert [found.id for found in index.rejected] == ["y@b:1"]
    (said,) = [text for text in caplog.messages if "id" in text]
    assert said == (
        f"data.train: 2 examples have an id that others have too: 'x' is that of {first}:1 and of "
        f"{second}:2. They are told apart by their place: these two are x@a:1 and x@b:2"
    )
    caplog.clear()
    build(tmp_path / "i", first, second)  # from what is cached, and again at every start
    assert len(caplog.messages) == 1


def test_one_id_for_all_records_of_a_speaker_as_published_sets_have_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "train.json"
    items = [{"id": "client7", "input": "[Hu1]", "output": f"text {i}"} for i in range(3)]
    path.write_text(json.dumps(items))
    with caplog.at_level(logging.WARNING):
        index = build(tmp_path / "i", path)
    assert called(index) == [f"client7@train:{i}" for i in (1, 2, 3)]
    assert "3 examples have an id that others have too: 'client7'" in caplog.text


def test_a_file_for_two_tasks_is_no_fault_of_the_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wav = str(clip(tmp_path / "a.wav"))
    path = str(jsonl(tmp_path / "a.jsonl", [asr(wav, id="x"), asr(wav)]))
    both = [Source(path=path, task=task, name=task) for task in ("asr", "tts")]
    index = build(tmp_path / "i", *both)
    assert called(index) == ["x@a[asr]:1", "a[asr]:2", "x@a[tts]:1", "a[tts]:2"]
    assert not caplog.messages


def test_names_change_nothing_of_the_plan_and_do_not_follow_data_that_moves(
    tmp_path: Path,
) -> None:
    data, run = Data(lanes=1, tokens_per_batch=200, extend=True), tmp_path / "run"
    run.mkdir()
    wav = str(clip(tmp_path / "a.wav"))
    lines = [asr(wav), asr(wav, id="x"), asr(wav, id="x")]
    files = [
        jsonl(tmp_path / lang / "train.jsonl", lines[:n]) for lang, n in (("en", 3), ("de", 1))
    ]
    index = build(tmp_path / "i", *files)
    plan = plans.follow(run, index, data, 0, None)
    cursor = next(plan.steps(plan.start())).after
    before = called(open_index(plans.places(run)))
    assert before == ["en/train:1", "x@en/train:2", "x@en/train:3", "de/train:1"]
    (tmp_path / "en").rename(tmp_path / "english")
    moved = build(tmp_path / "i", tmp_path / "english" / "train.jsonl", files[1])
    assert moved.hash == index.hash
    plans.follow(run, moved, data, 0, cursor)
    assert called(open_index(plans.places(run))) == before
    third = jsonl(tmp_path / "fr" / "train.jsonl", lines[:1])
    more = build(tmp_path / "i", tmp_path / "english" / "train.jsonl", files[1], third)
    plans.follow(run, more, data, 0, cursor)
    rows = open_index(plans.places(run))
    assert rows.ids(np.arange(len(rows))) == [*before, *before, "fr/train:1"]


def test_a_run_from_before_names_were_unique_keeps_its_ids(tmp_path: Path) -> None:
    data, run = Data(lanes=1, tokens_per_batch=200, extend=True), tmp_path / "run"
    run.mkdir()
    wav = str(clip(tmp_path / "a.wav"))
    files = [jsonl(tmp_path / lang / "train.jsonl", [asr(wav)]) for lang in ("en", "de")]
    index = build(tmp_path / "i", *files)
    plan = plans.follow(run, index, data, 0, None)
    cursor = next(plan.steps(plan.start())).after
    known = json.loads((run / "plan.json").read_bytes())
    del known[0]["names"]
    (run / "plan.json").write_text(json.dumps(known))
    plans.follow(run, index, data, 0, cursor)
    rows = open_index(plans.places(run))
    assert rows.ids(np.arange(len(rows))) == ["train:1", "train:1"]
    assert not plans.chained(run)


def test_quarantine_ledger_audit_and_predictions_tell_all_examples_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for lang, count in itertools.product(("en", "de"), (30,)):
        lines = []
        for number in range(count):
            samples = (rng.standard_normal(8000) * 0.1).astype(np.float32)
            if number in (4, 9):
                samples[:] = np.nan  # its header is sound
            path = tmp_path / lang / f"c{number}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, samples, 16000, subtype="FLOAT")
            lines.append(asr(path.name, f"{lang} {number}"))
        jsonl(tmp_path / lang / "train.jsonl", lines)
    dev = [asr(f"en/c{i}.wav", f"reference number {i}", id="rec1") for i in range(4)]
    jsonl(tmp_path / "dev.jsonl", dev)
    tree = {
        "run": {"name": "r", "storage_path": str(tmp_path / "runs"), "seed": 1},
        "data": {
            "train": [
                {"path": str(tmp_path / "en/train.jsonl"), "name": "english"},
                {"path": str(tmp_path / "de/train.jsonl"), "name": "german"},
            ],
            "eval": [{"path": str(tmp_path / "dev.jsonl")}],
            "lanes": 2,
            "tokens_per_batch": 300,
            "max_quarantined": 0.3,
        },
        "model": AUDIO,
        "train": {"epochs": 1},
        "log": {"tensorboard": False},
        "evaluate": {"max_new_tokens": 3},
    }
    train(start(Config.model_validate(tree), World.current()))
    run = tmp_path / "runs" / "r"
    refused = {f"{lang}/train:{line}" for lang in ("en", "de") for line in (5, 10)}
    assert {line["id"] for line in read_lines(run / "quarantine.jsonl")} == refused
    lines = [line for path in (run / "ledger").iterdir() for line in read_lines(path)]
    ids = [name for line in lines for name in line["ids"]]
    assert len(ids) == len(set(ids)) == 56
    assert {name for line in lines for name in line["quarantined"]} == refused
    report = audit(run)
    assert report.clean
    assert report.quarantined == refused
    (path,) = (run / "predictions").iterdir()
    said = [(line["id"], line["reference"]) for line in read_lines(path)]
    assert said == [(f"rec1@dev:{i + 1}", f"reference number {i}") for i in range(4)]
    # One of two examples of a number is missing from the ledger: naming the other is no excuse.
    with open(run / "quarantine.jsonl", "a") as out:
        out.write(json.dumps({"id": "en/train:7", "source": "english", "reason": "x"}) + "\n")
    for path in (run / "ledger").iterdir():
        kept = [
            {**line, "ids": [name for name in line["ids"] if not name.endswith("train:7")]}
            for line in read_lines(path)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    report = audit(run)
    assert report.lost == 2
