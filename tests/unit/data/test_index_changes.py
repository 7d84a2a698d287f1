"""A data file that has changed: what is new is measured, and everything lies where it says."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest

from raysft.data.index import part
from raysft.data.sources import json_items, json_lines
from tests.support.indexes import (
    aged,
    asr,
    build,
    clip,
    contents,
    jsonl,
)


def fresh(tmp_path, *files):
    """The index of these files, measured from nothing."""
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    return contents(build(tmp_path / "new", *files))


def clips(tmp_path, count):
    """Lines over as many clips; the names tell which were looked at."""
    first = clip(tmp_path / "0.wav", 0.2)
    for number in range(1, count):
        shutil.copy2(first, tmp_path / f"{number}.wav")
    return [asr(f"{number}.wav", f"text {number}") for number in range(count)]


def test_an_appended_line_opens_its_own_clip_and_those_of_the_last_chunk(
    tmp_path, small_chunks, probes
):
    lines = clips(tmp_path, 60)
    file = jsonl(tmp_path / "t.jsonl", lines[:59])
    build(tmp_path / "i", file)
    last = json_lines.survey(file).chunks[-1]
    probes.clear()
    jsonl(file, lines)
    index = build(tmp_path / "i", file)
    assert "59.wav" in probes
    assert len(json_lines.survey(file).chunks) > 5
    assert {int(name[:-4]) for name in probes} <= set(range(last.first - 1, 60))
    probes.clear()
    assert build(tmp_path / "i", file).folder == index.folder
    assert probes == []
    assert contents(index) == fresh(tmp_path, file)


@pytest.mark.parametrize("at", [0, 30])
def test_a_line_inserted_or_taken_out_costs_the_chunks_around_it_and_moves_the_others(
    tmp_path, small_chunks, probes, at
):
    lines = clips(tmp_path, 120)
    file = jsonl(tmp_path / "t.jsonl", lines)
    before = contents(build(tmp_path / "i", file))
    probes.clear()
    jsonl(file, [*lines[:at], asr("7.wav", "one more, of another length"), *lines[at:]])
    inserted = build(tmp_path / "i", file)
    assert len(set(probes)) < 40
    assert [e.text for e in inserted.examples(np.arange(121))][at + 1] == f"text {at}"
    assert contents(inserted) == fresh(tmp_path, file)
    jsonl(file, lines)
    assert contents(build(tmp_path / "i", file)) == before


def test_the_hash_of_data_that_came_in_parts_is_that_of_data_that_came_at_once(
    tmp_path, small_chunks
):
    lines = clips(tmp_path, 40)
    lines[30]["task_type"] = "tts"  # a task that the rest does not have, for a while
    file = jsonl(tmp_path / "t.jsonl", lines)
    build(tmp_path / "i", file)
    for some in (lines[:20], lines[10:], lines[:35], lines):
        jsonl(file, some)
        assert contents(build(tmp_path / "i", file)) == fresh(tmp_path, file)


@pytest.mark.parametrize("kind", ["lines", "items"])
def test_any_change_gives_the_index_that_is_measured_from_nothing(tmp_path, small_chunks, kind):
    """Items come, go, change, repeat and are unusable; clips are missing, and are replaced."""
    rng = random.Random(kind)
    for number in range(4):
        clip(tmp_path / f"{number}.wav", 0.1 * (number + 1))

    def line():
        if kind == "items":
            broken = {"id": "broken", "input": "[Hu", "output": "x"}
            units = "[Hu1]" * rng.randint(1, 9)
            good = {"input": units, "output": "x" * rng.randint(1, 9)}
            if rng.random() < 0.2:
                good["id"] = f"e{rng.random()}"
            return rng.choices([good, broken], [9, 1])[0]
        wav = rng.choices(["0.wav", "1.wav", "2.wav", "3.wav", "gone.wav"], [4, 4, 4, 4, 1])[0]
        record = asr(wav, "x" * rng.randint(1, 9), task_type=rng.choice(["asr", "tts"]))
        if rng.random() < 0.5:
            record["lang"] = rng.choice(["de", "de", "de", f"x{rng.random()}"])
        return rng.choices([json.dumps(record), "{broken", ""], [18, 1, 1])[0]

    data = [line() for _ in range(80)]
    file = tmp_path / ("t.jsonl" if kind == "lines" else "t.json")
    cut = {"lines": json_lines, "items": json_items}[kind]
    moved = 0
    for step in range(12):
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            how = rng.choice(["insert", "delete", "change", "append", "swap", "repeat"])
            if how == "insert":
                data.insert(at, line())
            elif how == "delete":
                del data[at]
            elif how == "change":
                data[at] = line()
            elif how == "append":
                data.append(line())
            elif how == "swap":
                data = data[at:] + data[:at]
            else:
                data[at:at] = data[at : at + 30]
        if kind == "lines" and step % 4 == 3:
            clip(tmp_path / f"{rng.randrange(4)}.wav", rng.choice([0.15, 0.25]))
        old = {chunk.digest for chunk in cut.survey(file).chunks} if step else set()
        if kind == "lines":
            jsonl(file, data)
        else:
            file.write_text(json.dumps(data))
        moved += len(old & {chunk.digest for chunk in cut.survey(file).chunks})
        assert contents(build(tmp_path / "i", file)) == fresh(tmp_path, file)
    assert moved > 40, "most chunks are known again"


def test_a_cache_of_an_earlier_version_is_measured_again_and_said_so(tmp_path, monkeypatch, caplog):
    clip(tmp_path / "a.wav")
    file = jsonl(tmp_path / "t.jsonl", [asr()])
    aged(file)
    with monkeypatch.context() as patch:
        patch.setattr(part, "MEASURED", part.MEASURED - 1)
        old = build(tmp_path / "i", file)
    assert caplog.text == ""
    assert build(tmp_path / "i", file).hash == old.hash
    assert f"data.train: {file} was measured by an earlier version of raysft" in caplog.text
    caplog.clear()
    build(tmp_path / "i", file)
    assert caplog.text == ""


def test_lines_that_hold_the_same_are_told_apart_by_their_place(tmp_path, small_chunks):
    lines = [asr("0.wav", "always the same")] * 50
    clip(tmp_path / "0.wav", 0.2)
    file = jsonl(tmp_path / "t.jsonl", lines)
    build(tmp_path / "i", file)
    jsonl(file, [asr("0.wav", "first"), *lines])
    index = build(tmp_path / "i", file)
    assert index.ids(np.arange(51)) == [f"t:{line}" for line in range(1, 52)]
    assert contents(index) == fresh(tmp_path, file)


def test_ids_that_look_like_those_of_lines_stay_their_records_when_these_move(
    tmp_path, small_chunks
):
    """`en/t.jsonl` and `de/t.jsonl` have a record that calls itself t:60, at first in line 60."""
    clip(tmp_path / "c.wav", 0.2)
    records = [asr("../c.wav", f"text {number}") for number in range(80)]
    records[59]["id"] = "t:60"
    files = [tmp_path / lang / "t.jsonl" for lang in ("en", "de")]
    for file in files:
        file.parent.mkdir()
        jsonl(file, records)
    build(tmp_path / "i", *files)
    for file in files:
        jsonl(file, [*(asr("../c.wav", f"new {number}") for number in range(40)), *records])
    moved, anew = build(tmp_path / "i", *files), build(tmp_path / "new", *files)
    names = [index.ids(np.arange(240)) for index in (moved, anew)]
    assert len(set(names[0])) == 240
    assert names[0] == names[1]
    assert names[0][99] == "t:60@en/t:100"


@pytest.mark.parametrize("kind", ["lines", "long lines", "items"])
def test_an_edit_of_many_lines_costs_the_chunks_that_they_are_in(tmp_path, kind):
    draws = np.random.default_rng(0)
    width = 30_000 if kind == "long lines" else 200
    count = 60_000_000 // width // 4
    records = [
        {"instruction": f"n{n}", "input": "x" * int(draws.integers(1, width)), "output": str(n)}
        for n in range(count)
    ]

    def digests():
        if kind == "items":
            (tmp_path / "t.json").write_text(json.dumps(records))
            return [chunk.digest for chunk in json_items.survey(tmp_path / "t.json").chunks]
        jsonl(tmp_path / "t.jsonl", records)
        return [chunk.digest for chunk in json_lines.survey(tmp_path / "t.jsonl").chunks]

    before = digests()
    few = count // 100  # of about a tenth of a chunk
    for record in records[count // 2 : count // 2 + few]:
        record["output"] += " changed"
    after = digests()
    assert len(before) >= 6
    assert len(set(before) & set(after)) >= len(before) - 2
