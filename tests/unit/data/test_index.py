"""The index: lengths of all examples, built in parallel, cached, hashed by content."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft.config.schema import Source
from raysft.data import sources
from raysft.data.clips import audio
from raysft.data.example import Quarantined
from raysft.data.index import part, table
from raysft.data.index.build import Index
from raysft.data.sources import json_items, json_lines, records
from raysft.errors import UserError
from tests.support.indexes import (
    RATE,
    Encoder,
    asr,
    build,
    clip,
    contents,
    corpus,
    jsonl,
    most,
)


def test_lengths_come_from_headers_of_any_format_rate_and_channel_count(tmp_path):
    made = [
        ("a.wav", 8000, 1, {}),
        ("b.flac", 22050, 2, {}),
        ("c.ogg", 44100, 1, {}),
        ("d.wav", 96000, 2, {}),
        ("e.mp3", 16000, 1, {}),
    ]
    for name, rate, channels, kwargs in made:
        clip(tmp_path / "audio" / name, 0.5, rate, channels, **kwargs)
    paths = [f"audio/{made[i][0]}" for i in range(4)] + [str(tmp_path / "audio/e.mp3")]
    index = build(tmp_path / "index", jsonl(tmp_path / "a.jsonl", [asr(p) for p in paths]))
    assert index.rejected == []
    assert index.tokens.dtype == np.int32
    assert index.seconds.dtype == np.float32
    for row, (name, rate, _, _) in enumerate(made):
        decoded = len(soundfile.read(tmp_path / "audio" / name)[0])
        assert index.seconds[row] == pytest.approx(decoded / rate, abs=1e-6)
        length = len(audio.load(str(tmp_path / "audio" / name), RATE))
        assert index.tokens[row] == length // 160 + len("hello")


def test_columns_tell_tasks_and_sources_and_rows_give_back_their_examples(tmp_path):
    file = corpus(tmp_path)
    units = most(tmp_path / "units.json", 10)
    index = build(tmp_path / "i", Source(path=str(file), weight=2.5), Source(path=str(units)))
    assert [tuple(source) for source in index.sources] == [("corpus", 2.5), ("units", 1.0)]
    assert index.tasks == ["asr", "tts"]
    examples = index.examples(np.arange(len(index)))
    assert [e.task for e in examples] == [index.tasks[t] for t in index.task]
    from_units = np.array([e.id.startswith("m") for e in examples])
    assert np.array_equal(index.source, from_units)
    assert index.source_name(0) == "corpus"
    resolved = sources.resolve(Source(path=str(file)), "train")
    expected = [
        item.example
        for item in sources.scan(resolved, file)
        if item.example and "missing" not in item.example.audio()[0].path
    ]
    assert examples[: len(expected)] == expected
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(len(index)), 2))
    assert index.examples(rows) == [examples[row] for row in rows]
    assert index.ids(rows[:3]) == [examples[row].id for row in rows[:3]]
    assert index.examples(np.zeros(0, np.int64)) == []


def test_records_far_apart_and_in_many_files_are_read_right(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "GAP", 40)
    monkeypatch.setattr(records, "SPAN", 200)
    monkeypatch.setattr(table, "OPEN_FILES", 2)
    files = [most(tmp_path / f"{i}.json", 30, 30 * i) for i in range(5)]
    index = build(tmp_path / "i", *files)
    rows = np.random.default_rng(1).permutation(len(index))
    assert index.ids(rows) == [f"m{row}" for row in rows]


def test_unusable_items_are_rejected_with_their_reason_and_the_rest_is_indexed(tmp_path):
    good = str(clip(tmp_path / "a.wav"))
    text = tmp_path / "text.wav"
    text.write_text("no audio")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "fifo.wav")  # opening it would wait for ever
    names = ("missing.wav", "text.wav", "empty.wav", "folder.wav", "fifo.wav")
    records = [asr(id="good"), "{broken", asr(task_type="vc"), asr(text="too long", id="long")]
    file = jsonl(tmp_path / "t.jsonl", [*records, *(asr(name, id=name) for name in names)])
    index = build(tmp_path / "i", file)
    assert index.ids([0]) == ["good"]
    assert len(index) == 1
    rejected = index.rejected
    assert [r.id for r in rejected] == ["t:2", "t:3", "long", *names]
    assert [r.path for r in rejected[:3]] == [str(file), str(file), good]
    assert [r.path for r in rejected[3:]] == [str(tmp_path / name) for name in names]
    assert {r.source for r in rejected} == {"t"}
    assert rejected[0].reason.startswith("t.jsonl line 2: not valid JSON")
    assert "supported: asr, tts" in rejected[1].reason
    assert rejected[2].reason == "t.jsonl line 4: longer than the model reads"
    assert all(str(tmp_path) in r.reason for r in rejected[3:])
    assert isinstance(rejected[0], Quarantined)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_index_is_the_same_for_any_chunking_and_number_of_processes(
    tmp_path, small_chunks, workers
):
    file, units = corpus(tmp_path), most(tmp_path / "units.json", 60)
    found = contents(build(tmp_path / "i", file, units, workers=workers))
    chunks = len(json_lines.survey(file).chunks) + len(json_items.survey(units).chunks)
    assert chunks > 10
    json_lines.survey.__defaults__ = (1 << 20,)
    json_items.survey.__defaults__ = (1 << 20, 4096)
    assert contents(build(tmp_path / "j", file, units, workers=1)) == found


@pytest.mark.slow
def test_ray_tasks_give_the_same_index_and_their_errors_are_readable(tmp_path, small_chunks):
    ray = pytest.importorskip("ray")
    file, units = corpus(tmp_path), most(tmp_path / "units.json", 60)
    bad = jsonl(tmp_path / "bad.jsonl", [asr("0.wav", "x" * i) for i in range(1, 20)])
    bad.write_text(bad.read_text() + json.dumps(asr("0.wav", "impossible", id="this")) + "\n")
    here = contents(build(tmp_path / "i", file, units, workers=1))
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},  # has our Encoder
    )
    try:
        assert contents(build(tmp_path / "j", file, units, workers=2)) == here
        with pytest.raises(UserError) as caught:
            build(tmp_path / "j", bad, workers=2)
    finally:
        ray.shutdown()
    text = "data.train[0]: this (bad.jsonl line 20): set model.family"
    assert str(caught.value) == text


def test_nothing_new_is_not_measured_again(tmp_path, probes):
    file = corpus(tmp_path)
    first = build(tmp_path / "i", file)
    probes.clear()
    second = build(tmp_path / "i", file)
    assert set(probes) == {"missing.wav"}  # it may have come back
    assert second.folder == first.folder
    assert contents(second) == contents(first)


def test_an_untouched_file_is_not_read_again(tmp_path, monkeypatch):
    file = corpus(tmp_path)
    old = time.time() - 100
    os.utime(file, (old, old))
    first = build(tmp_path / "i", file)
    calls = []
    real = json_lines.survey
    monkeypatch.setattr(json_lines, "survey", lambda path: calls.append(path) or real(path))
    assert build(tmp_path / "i", file).hash == first.hash
    assert calls == []
    os.utime(file)  # touched: read, but the same
    assert build(tmp_path / "i", file).hash == first.hash
    assert calls == [file]


def test_changing_one_file_measures_that_file_only_and_changes_the_hash(tmp_path, probes):
    for name in ("a", "b", "c"):
        clip(tmp_path / f"{name}.wav")
        jsonl(tmp_path / f"{name}.jsonl", [asr(f"{name}.wav")])
    files = [tmp_path / f"{name}.jsonl" for name in ("a", "b", "c")]
    first = build(tmp_path / "i", *files)
    probes.clear()
    jsonl(files[1], [asr("b.wav", "jello")])  # as many bytes as before
    second = build(tmp_path / "i", *files)
    assert probes == ["b.wav"]
    assert second.hash != first.hash
    assert [e.text for e in second.examples(np.arange(3))] == ["hello", "jello", "hello"]


def test_the_hash_is_that_of_what_is_planned(tmp_path):
    clip(tmp_path / "x/a.wav", 0.5)
    clip(tmp_path / "x/b.wav", 0.7)
    file = jsonl(tmp_path / "x/a.jsonl", [asr(), asr("b.wav")])
    other = jsonl(tmp_path / "x/other.jsonl", [asr("b.wav")])

    def of(*entries, **kwargs):
        return build(tmp_path / "i", *entries, **kwargs).hash

    first = of(file)
    assert of(Source(path=str(file), name="n", weight=3.0)) == first
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    moved = build(tmp_path / "i", tmp_path / "y/a.jsonl")
    assert moved.hash == first
    assert moved.examples([0])[0].audio()[0].path == str(tmp_path / "y/a.wav")
    different = {
        of(file, encoder=Encoder("g")),
        of(Source(path=str(file), task="tts")),
        of(file, other),
        of(other, file),
        of(other),
    }
    assert len(different | {first}) == 6
    clip(tmp_path / "y/a.wav", 0.9)
    shutil.rmtree(tmp_path / "i")
    assert of(tmp_path / "y/a.jsonl") != first


def test_names_and_weights_are_those_of_the_config_not_of_the_cache(tmp_path):
    units = most(tmp_path / "u.json", 3)
    build(tmp_path / "i", units)
    index = build(tmp_path / "i", Source(path=str(units), name="n", weight=3.0))
    assert index.sources == [("n", 3.0)]


def test_a_repaired_clip_comes_back(tmp_path, probes):
    clip(tmp_path / "a.wav")
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    lines = [asr("missing.wav", id="m"), asr("b.wav", id="b"), asr(id="a"), "{broken"]
    file = jsonl(tmp_path / "t.jsonl", lines)
    first = build(tmp_path / "i", file)
    assert (first.ids([0]), len(first.rejected)) == (["a"], 3)
    clip(tmp_path / "b.wav", 0.3)
    probes.clear()
    second = build(tmp_path / "i", file)
    assert sorted(probes) == ["b.wav", "missing.wav"]
    assert second.ids(np.arange(2)) == ["b", "a"]
    assert [r.id for r in second.rejected] == ["m", "t:4"]
    assert second.hash != first.hash
    shutil.rmtree(tmp_path / "i")
    assert contents(build(tmp_path / "i", file)) == contents(second)


def test_an_index_travels_as_its_folder(tmp_path):
    index = build(tmp_path / "i", most(tmp_path / "u.json", 500))
    data = pickle.dumps(index)
    assert len(data) < 500
    assert contents(pickle.loads(data)) == contents(index)
    assert contents(Index.load(str(index.folder))) == contents(index)


def test_a_folder_is_split_by_its_file_names(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    most(folder / "x_train.json", 3)
    most(folder / "y_train.json", 3, 3)
    most(folder / "x_dev.json", 2, 10)
    train = build(tmp_path / "i", folder)
    assert train.ids(np.arange(len(train))) == [f"m{i}" for i in range(6)]
    assert train.sources == [("data", 1.0)]
    assert build(tmp_path / "i", folder, split="eval").ids([0, 1]) == ["m10", "m11"]


def test_a_source_without_a_usable_example_is_refused_by_key(tmp_path):
    units = most(tmp_path / "u.json", 3)
    blank = jsonl(tmp_path / "blank.jsonl", ["", " "])
    bad = jsonl(tmp_path / "bad.jsonl", [asr("missing.wav"), asr("gone.wav")])
    with pytest.raises(UserError, match=r"data.train\[1\]: .*blank.jsonl holds no example"):
        build(tmp_path / "i", units, Source(path=str(blank), format="ming_jsonl"))
    with pytest.raises(UserError, match=r"data.eval\[0\]: none of the 2 .* line 1: .*missing.wav"):
        build(tmp_path / "i", bad, split="eval")
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(UserError, match=r"data.train\[0\]: .*none.json holds no example"):
        build(tmp_path / "i", tmp_path / "none.json")
    (tmp_path / "cut.json").write_text(units.read_text()[:-9])
    with pytest.raises(UserError, match=r"data.train\[0\]: .*cut.json: not valid JSON"):
        build(tmp_path / "i", tmp_path / "cut.json")
    with pytest.raises(UserError, match=r"data.eval is empty"):
        build(tmp_path / "i", split="eval")


def test_data_that_changes_under_a_run_is_noticed(tmp_path):
    units = most(tmp_path / "u.json", 50)
    index = build(tmp_path / "i", units)
    units.write_text(units.read_text().replace("text 3", "text 4"))
    with pytest.raises(UserError, match=r"u.json has changed since it was indexed \(item 4\)"):
        Index.load(index.folder).examples(np.arange(50))
    units.unlink()
    with pytest.raises(UserError, match=r"u.json: its storage does not give it on .*: No such"):
        Index.load(index.folder).examples([0])


def test_data_that_changes_while_it_is_indexed_is_refused(tmp_path, monkeypatch):
    file = corpus(tmp_path)
    real = part.measure

    def measure(job, encoder):
        with open(file, "a") as stream:
            stream.write("\n")
        return real(job, encoder)

    monkeypatch.setattr(part, "measure", measure)
    with pytest.raises(UserError, match="changed while it was indexed"):
        build(tmp_path / "i", file)
    monkeypatch.undo()
    assert len(build(tmp_path / "i", file)) > 0


def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path, monkeypatch):
    units = most(tmp_path / "u.json", 50)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"data.index_path: cannot write .*No space left"):
            build(tmp_path / "i", units)
    assert [path for path in (tmp_path / "i").rglob("*") if path.is_file()] == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.index_path: cannot write the index"):
        build(tmp_path / "file", units)
    part_saved = build(tmp_path / "i", units)
    shutil.rmtree(part_saved.folder)
    with monkeypatch.context() as patch:  # the part is there, the index is not
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            build(tmp_path / "i", units)
    assert sorted(path.name for path in (tmp_path / "i").iterdir() if path.is_dir()) == ["parts"]


def _build_elsewhere(folder, path):
    build(Path(folder), Path(path))


def test_jobs_that_build_the_same_index_at_once_share_it(tmp_path):
    file = corpus(tmp_path)
    context = multiprocessing.get_context("spawn")
    target = str(tmp_path / "i")
    jobs = [context.Process(target=_build_elsewhere, args=(target, str(file))) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 4
    index = build(tmp_path / "i", file)
    made = [path for path in (tmp_path / "i").iterdir() if path.name not in ("parts", "files")]
    assert made == [index.folder]


def test_a_damaged_cache_is_named(tmp_path):
    units = most(tmp_path / "u.json", 5)
    index = build(tmp_path / "i", units)
    (saved,) = (tmp_path / "i/parts").glob("*.npz")
    saved.write_bytes(saved.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"data.index_path: {saved} is damaged"):
        build(tmp_path / "i", units)
    (index.folder / "meta.json").unlink()
    with pytest.raises(UserError, match="holds no index"):
        Index.load(index.folder)


def test_progress_counts_bytes_up_to_all_of_them(tmp_path, small_chunks):
    file = corpus(tmp_path)
    seen = []
    build(tmp_path / "i", file, progress=lambda done, total: seen.append((done, total)))
    size = file.stat().st_size
    assert seen[-1] == (size, size)
    assert len(seen) > 3
    assert seen == sorted(seen)


def test_all_stages_say_how_far_they_are(tmp_path, small_chunks):
    file = corpus(tmp_path)
    seen = []
    build(tmp_path / "i", file, stages=lambda *how_far: seen.append(how_far))
    size = file.stat().st_size
    assert [stage for stage, *_ in seen if stage != "measuring"] == ["reading files"]
    assert seen[-1] == ("measuring", size, size)
    seen.clear()
    build(tmp_path / "i", file, stages=lambda *how_far: seen.append(how_far))
    looked = [(done, total) for stage, done, total in seen if stage == "looking at known clips"]
    assert len(looked) > 3
    assert looked == sorted(looked)
    assert looked[-1][0] == looked[-1][1]


@pytest.fixture
def rows_read(monkeypatch):
    """Parts whose rows were loaded."""
    found = []
    load = part.load_part

    def counted(path, rows=True):
        if rows:
            found.append(path)
        return load(path, rows)

    monkeypatch.setattr(part, "load_part", counted)
    return found


def test_data_that_has_not_changed_is_not_joined_again(tmp_path, rows_read):
    file = corpus(tmp_path)
    first = build(tmp_path / "i", file)
    rows_read.clear()
    second = build(tmp_path / "i", file)
    assert rows_read == []
    assert (second.folder, second.repeats) == (first.folder, first.repeats)
    assert contents(second) == contents(first)
    # In a folder that may only be read it is joined each time.
    (record,) = (tmp_path / "i" / "parts").glob("*.json")
    record.unlink()
    record.mkdir()
    assert contents(build(tmp_path / "i", file)) == contents(first)
    assert rows_read


@pytest.mark.parametrize("what", ["index", "part", "clip", "record"])
def test_what_has_changed_is_joined_again(tmp_path, rows_read, what):
    lines = [asr(f"{n}.wav", id=f"e{n}") for n in range(3)]
    for n in range(3):
        clip(tmp_path / f"{n}.wav", 0.3)
    file = jsonl(tmp_path / "t.jsonl", lines)
    first = build(tmp_path / "i", file)
    kept = contents(first)
    rows_read.clear()
    if what == "index":
        shutil.rmtree(first.folder)
    elif what == "part":
        (path,) = (tmp_path / "i" / "parts").glob("*.npz")
        path.unlink()
    elif what == "clip":
        clip(tmp_path / "1.wav", 0.6)
    else:
        (record,) = (tmp_path / "i" / "parts").glob("*.json")
        record.write_text("{")
    second = build(tmp_path / "i", file)
    assert rows_read
    if what == "clip":
        assert second.seconds.tolist() == pytest.approx([0.3, 0.6, 0.3])
    else:
        assert contents(second) == kept


def test_ids_that_repeat_are_told_of_at_every_start(tmp_path, caplog):
    clip(tmp_path / "a.wav")
    file = jsonl(tmp_path / "t.jsonl", [asr(id="same"), asr(id="same")])
    for _ in range(2):
        caplog.clear()
        build(tmp_path / "i", file)
        assert "2 examples have an id that others have too: 'same'" in caplog.text
