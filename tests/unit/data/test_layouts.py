"""Corpora in the layouts that people have: each is read as the clips and texts it was made of."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysft.config.schema import Source
from raysft.data import sources
from raysft.data.clips import audio
from raysft.data.index.build import Index, build_index
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
