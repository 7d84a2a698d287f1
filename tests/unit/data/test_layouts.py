"""Corpora in the layouts that people have: each is read as the clips and texts it was made of."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysft.config.schema import Source
from raysft.data import sources
from raysft.data.clips import audio
from raysft.data.index import listing
from raysft.data.index.build import Index, build_index
from raysft.errors import UserError
from tests.support.indexes import Encoder
from tests.support.layouts import LAYOUTS, RATE, Layout, corpus

US = corpus()


def indexed(path: Path, layout: Layout, folder: Path, **more: Any) -> Index:
    source = Source(path=str(path), **{**layout.entry, **more})
    return build_index([source], "train", Encoder(), folder, workers=1)


def aged(folder: Path) -> None:
    """Files written long ago: what is known of them is kept."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 100,) * 2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_and_read_to_the_sample(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    path = layout.write(tmp_path / "data" / name, US)
    index = indexed(path, layout, tmp_path / "index")
    assert index.described[0]["format"] == layout.format
    found = {example.id: example for example in index.examples(np.arange(len(index)))}
    wanted = {layout.id(u, n): u for n, u in enumerate(US)}
    assert set(found) == set(wanted)
    for key, u in wanted.items():
        example = found[key]
        assert example.text == layout.text(u)
        assert example.speaker == (u.speaker if layout.speakers else None)
        (clip,) = example.audio()
        got = audio.load(clip, RATE)
        assert np.array_equal(np.round(got * 32768).astype(np.int16), u.samples), key
    lengths = sorted(len(u.samples) / RATE for u in US)
    assert sorted(index.seconds.tolist()) == pytest.approx(lengths, abs=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layouts_languages_are_kept_where_they_are_asked_for(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    path = layout.write(tmp_path / "data" / name, US)
    wanted = {layout.id(u, n): u.language if layout.languages else "" for n, u in enumerate(US)}
    asked, plain = (
        build_index(
            [Source(path=str(path), **layout.entry)],
            "train",
            Encoder(),
            tmp_path / "index",
            workers=1,
            languages=languages,
        )
        for languages in (True, False)
    )
    names, column = asked.languages
    assert dict(zip(asked.ids(np.arange(len(asked))), [names[n] for n in column])) == wanted
    # What other runs have listed, and what examples are otherwise, does not depend on it.
    for file in plain.files:
        records = map(json.loads, Path(file.path).read_text().splitlines())
        assert not any("language" in record for record in records if "listed" in record)
    one, two = (index.examples(np.arange(len(index))) for index in (asked, plain))
    assert [(e.id, e.text, e.lang) for e in one] == [(e.id, e.text, e.lang) for e in two]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_second_index_is_the_first_and_lists_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS[name]
    path = layout.write(tmp_path / "data" / name, US)
    aged(tmp_path / "data")
    first = indexed(path, layout, tmp_path / "index")
    form: Any = type(sources.get(layout.format))
    if form().beside(path, Source(path=str(path), **layout.entry)) is not None:

        def unexpected(*_: object) -> None:
            raise AssertionError("listed again")

        monkeypatch.setattr(form, "records", unexpected)
    assert indexed(path, layout, tmp_path / "index").hash == first.hash


# --- wrong twins: one line, which names the place and what to do


def damage(path: Path, old: str, new: str, code: str = "utf-8") -> None:
    text = path.read_text()
    assert old in text
    path.write_bytes(text.replace(old, new).encode(code))


def spoilt(name: str, wrong: str, top: Path) -> tuple[Path, str, str]:
    """Makes the wrong twin of a layout below `top`: its path; whether the whole source is refused,
    or a record; and what is said of it."""
    layout = LAYOUTS[name]
    path = source = layout.write(top / "data" / name, US)
    folder = path if path.is_dir() else path.parent
    texts = {
        "nemo": (path, '"text"'),
        "wenet": (path, '"txt"'),
        "funasr": (path, '"target"'),
        "emilia": (path, '"text"'),
        "step": (path, '"text"'),
        "common_voice": (path, "sentence"),
        "table": (path, "said"),
        "audiofolder": (path, "transcription"),
    }
    if wrong == "path":
        if name == "kaldi":
            damage(folder / "wav.scp", "kaldi_audio", "elsewhere")
            return source, "source", r"s0-10-0000\.flac: no such file"
        if name in ("librispeech", "aishell", "clip_folder", "ljspeech", "common_voice"):
            clip = next(path for end in ("flac", "wav") for path in sorted(top.rglob(f"*.{end}")))
            clip.unlink()
            return source, "record", "no clip|no such file|" + clip.stem
        damage(texts[name][0], f"{US[0].id}.", f"gone/{US[0].id}.")
        return source, "record", rf"{US[0].id}\.\w+: no such file"
    if wrong == "column":
        file, text_field = texts[name]
        damage(file, text_field, text_field.replace(text_field.strip('"'), "words"))
        return (
            source,
            "source",
            "(text|txt|target|said|sentence|transcription).*(missing|column)|is in no format",
        )
    if name == "kaldi":
        path = folder / "text"
    elif name == "librispeech":
        path = next(top.rglob("*.trans.txt"))
    elif name == "aishell":
        path = next(top.rglob("aishell_transcript*"))
    elif name == "ljspeech":
        path = folder / "metadata.csv"
    elif name == "clip_folder":
        path = next(top.rglob("*.lab"))
    path.write_bytes("é".join(path.read_text()).encode("latin-1", "replace"))
    return source, "source", "(UTF-8|utf-8).*(iconv|byte)"


TWINS = [
    *((name, "column") for name in ("nemo", "wenet", "funasr", "emilia", "step")),
    *((name, "column") for name in ("common_voice", "table", "audiofolder")),
    *((name, "path") for name in ("nemo", "kaldi", "wenet", "funasr", "emilia", "step", "table")),
    *((name, "path") for name in ("librispeech", "ljspeech", "common_voice", "audiofolder")),
    *((name, "encoding") for name in ("nemo", "kaldi", "wenet", "common_voice", "table")),
    *((name, "encoding") for name in ("librispeech", "aishell", "ljspeech", "clip_folder")),
]


@pytest.mark.parametrize(("name", "wrong"), TWINS)
def test_a_wrong_twin_is_one_line_with_what_to_do(tmp_path: Path, name: str, wrong: str) -> None:
    path, kind, says = spoilt(name, wrong, tmp_path)
    layout = LAYOUTS[name]
    try:
        index = indexed(path, layout, tmp_path / "index")
        assert kind == "record"
        assert index.rejected
        text = index.rejected[0].reason
    except UserError as error:
        text = str(error)
    assert "\n" not in text
    assert re.search(says, text), text


def test_a_folder_whose_files_name_no_split_is_for_training(tmp_path: Path) -> None:
    """LibriHeavy's instructions are one file that names none."""
    item = '[{"id": "a", "instruction": "Say", "input": "[Hu1]", "output": "x"}]'
    (tmp_path / "libriheavy_asr_instructions.json").write_text(item)
    source = sources.resolve(Source(path=str(tmp_path)), "train")
    assert [file.name for file in source.files] == ["libriheavy_asr_instructions.json"]
    (tmp_path / "dev.json").write_text(item)
    with pytest.raises(UserError, match=r"has no file named \*train\*\.json"):
        sources.resolve(Source(path=str(tmp_path)), "train")


def test_segments_kept_for_evaluation_are_not_trained_on_unasked(tmp_path: Path) -> None:
    path = LAYOUTS["gigaspeech"].write(tmp_path / "data", US)
    tree = json.loads(path.read_text())
    for number, segment in enumerate(tree["audios"][0]["segments"]):
        segment["subsets"] = ["{TEST}"] if number == 1 else ["{L}", "{XL}"]
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"has segments of TEST beside others: .*subset: XL"):
        indexed(path, LAYOUTS["gigaspeech"], tmp_path / "index")
    for subset, count in (("xl", len(US) - 1), ("{TEST}", 1)):
        assert len(indexed(path, LAYOUTS["gigaspeech"], tmp_path / "index", subset=subset)) == count


def test_relative_clips_begin_where_the_command_runs_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in processes that list from elsewhere, as tasks of Ray do."""
    folders = []
    for number in range(2):
        place = LAYOUTS["lhotse"].write(tmp_path / "data" / str(number), US)
        text = gzip.decompress(place.read_bytes()).decode()
        plain = place.with_name(f"cuts{number}.jsonl")
        plain.write_text(text.replace(str(tmp_path) + "/", ""))
        folders.append(Source(path=str(plain)))
    monkeypatch.chdir(tmp_path)
    resolved = sources.resolve_all(folders, "train")
    real = listing.fan_out

    def elsewhere(*args: Any, **more: Any) -> Any:
        with contextlib.chdir("/"):
            return real(*args, **more)

    monkeypatch.setattr(listing, "fan_out", elsewhere)
    for source in listing.listed(resolved, tmp_path / "index", 1):
        (found, *_) = sources.scan(replace(source, given=None), source.files[0])
        assert found.example is not None
        assert audio.probe(found.example.audio()[0]).samples == len(US[0].samples)


def test_formats_are_known_without_what_only_some_of_them_read_with() -> None:
    """A mistake in a config is said before libraries are loaded that it needs not."""
    script = "import sys, raysft.data.sources as s; s.formats(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    heavy = {"pyarrow", "fsspec", "upath", "lhotse", "datasets", "torch", "ray"}
    assert done.returncode == 0, done.stderr
    assert not heavy & set(done.stdout.split())
