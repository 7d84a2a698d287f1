"""Objects in stores: the same corpora are read from S3's protocol as from files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raysft import patience, stores
from raysft.config.schema import Source
from raysft.data import sources
from raysft.data.clips import audio
from raysft.data.clips.file import File
from raysft.data.example import Audio, Within
from raysft.data.index.build import Index, build_index
from raysft.errors import BadExample, UserError
from tests.support import buckets
from tests.support.indexes import Encoder
from tests.support.layouts import LAYOUTS, RATE, corpus, jsonl

US = corpus()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with buckets.store() as url:
        yield url


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    before = patience.allowed()
    patience.allow(0.3)
    yield
    patience.allow(before)


def indexed(path: str, folder: Path, **entry: object) -> Index:
    return build_index([Source(path=path, **entry)], "train", Encoder(), folder, workers=1)


FEW = ("nemo_tarred", "kaldi_segments", "shar", "librispeech", "common_voice", "parquet", "packed")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
        for name in LAYOUTS
        if name != "arrow"
    ],
)
def test_a_corpus_in_a_store_is_read_as_from_files(bucket: str, tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    path = layout.write(tmp_path / "data" / name, US)
    here = indexed(str(path), tmp_path / "here", **layout.entry)
    buckets.upload(tmp_path / "data", tmp_path)
    there = indexed(f"{bucket}/{path.relative_to(tmp_path)}", tmp_path / "there", **layout.entry)
    assert there.described[0]["format"] == here.described[0]["format"] == layout.format
    assert np.array_equal(there.seconds, here.seconds)
    rows = np.arange(len(here))
    for one, other in zip(here.examples(rows), there.examples(rows), strict=True):
        assert (one.id, one.text, one.speaker) == (other.id, other.text, other.speaker)
        clips = zip(one.audio(), other.audio(), strict=True)
        for clip, remote in clips:
            assert np.array_equal(audio.load(clip, RATE), audio.load(remote, RATE))


def test_an_object_that_is_replaced_is_measured_again(bucket: str, tmp_path: Path) -> None:
    def put(name: str, seconds: float) -> None:
        samples = np.zeros(int(seconds * RATE), np.int16)
        one = type(US[0])("x", "s", "x", samples)
        buckets.client().put_object(Bucket=buckets.BUCKET, Key=name, Body=one.encoded())

    put("replaced/a.flac", 1.0)
    manifest = jsonl(
        tmp_path / "m.json", [{"audio_filepath": f"{bucket}/replaced/a.flac", "text": "x"}]
    )
    assert indexed(str(manifest), tmp_path / "index").seconds.tolist() == [1.0]
    put("replaced/a.flac", 1.5)
    assert indexed(str(manifest), tmp_path / "index").seconds.tolist() == [1.5]


def test_a_manifest_that_grows_in_a_store_is_listed_again(bucket: str, tmp_path: Path) -> None:
    line = b'{"audio_filepath": "/nowhere.flac", "text": "x"}\n'
    good = jsonl(tmp_path / "x.json", []).with_suffix(".flac")
    good.write_bytes(US[0].encoded())
    line = line.replace(b"/nowhere.flac", str(good).encode())
    for count in (1, 3):
        buckets.client().put_object(Bucket=buckets.BUCKET, Key="grows.json", Body=line * count)
        assert len(indexed(f"{bucket}/grows.json", tmp_path / "index")) == count


def test_an_object_that_is_not_there_is_missing_and_others_are_waited_for(bucket: str) -> None:
    with pytest.raises(BadExample, match=r"s3://corpora/none\.flac: no such file"):
        audio.probe(f"{bucket}/none.flac")
    with pytest.raises(OSError, match=r"s3://corpora/none\.flac") as caught:
        audio.load(f"{bucket}/none.flac", RATE, indexed=True)
    assert patience.missing(caught.value)


def test_parts_of_objects_are_fetched_in_few_requests(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = np.random.default_rng(0).bytes(3 << 20)
    buckets.client().put_object(Bucket=buckets.BUCKET, Key="large.bin", Body=content)
    asked: list[int] = []
    read = stores.read
    monkeypatch.setattr(stores, "read", lambda *a: (asked.append(a[2]), read(*a))[1])
    file = File("x", held=Within(f"{bucket}/large.bin", 1 << 20, 2 << 20))
    assert file.size == 2 << 20
    for at in range(0, 4096, 64):
        assert file.read(at, 64) == content[(1 << 20) + at :][:64]
    assert len(asked) == 1
    assert file.read((2 << 20) - 10, 100) == content[-10:]
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere://x/y.json", "nowhere://x/y.json: nowhere:// cannot be read here"),
        ("s3://corpora/absent/x.json", "s3://corpora/absent/x.json does not exist"),
    ],
)
@pytest.mark.usefixtures("bucket")
def test_what_cannot_be_read_is_said_by_key(path: str, says: str) -> None:
    with pytest.raises(UserError, match=rf"data\.train\.path: {says}"):
        sources.resolve(Source(path=path), "train")


def test_a_held_clip_names_its_archive_and_member(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no audio at all" * 10)
    clip = Audio(f"{tmp_path}/a.tar::x.flac", held=Within(f"{tmp_path}/a.tar", 5, 100))
    with pytest.raises(BadExample, match=r"a\.tar::x\.flac: not audio"):
        audio.probe(clip)
    beyond = Audio("a.tar::y.flac", held=Within(f"{tmp_path}/a.tar", 100, 100))
    with pytest.raises(BadExample, match=r"a\.tar::y\.flac: cut off: its file has 150 bytes"):
        audio.load(beyond, RATE)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Places that are asked for from now on, once a request."""
    seen: list[str] = []
    asked = stores._asked
    monkeypatch.setattr(
        stores, "_asked", lambda place, call: (seen.append(place), asked(place, call))[1]
    )
    return seen


def test_a_clip_costs_two_requests_and_an_entry_a_few(
    bucket: str, tmp_path: Path, requests: list[str]
) -> None:
    """Every format looks at a source of `auto`; together they look once."""
    clip = f"{bucket}/few/a.flac"
    buckets.client().put_object(Bucket=buckets.BUCKET, Key="few/a.flac", Body=US[0].encoded())
    audio.probe(clip)
    assert requests == [clip] * 2  # its size, and its content
    requests.clear()
    audio.load(clip, RATE)
    assert requests == [clip] * 2
    body = b'{"audio_filepath": "a.flac", "text": "x"}\n' * 3
    buckets.client().put_object(Bucket=buckets.BUCKET, Key="few/m.json", Body=body)
    buckets.client().put_object(Bucket=buckets.BUCKET, Key="few/p.parquet", Body=b"PAR1" * 99)
    for name in ("few/m.json", "few"):
        requests.clear()
        sources.resolve(Source(path=f"{bucket}/{name}"), "train")
        assert len(requests) < 20, requests


def test_a_folder_of_very_many_files_is_recognised_by_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for speaker in range(40):
        LAYOUTS["clip_folder"].write(tmp_path / "corpus" / str(speaker), US[:2])
    looked: list[Path] = []
    entries = stores.entries
    monkeypatch.setattr(
        stores, "entries", lambda folder, most: (looked.append(folder), entries(folder, most))[1]
    )
    assert sources.resolve(Source(path=str(tmp_path / "corpus")), "train").format == "clip_folder"
    assert len(looked) < 30, "of 121 folders"
    assert len(set(looked)) == len(looked), "each once, whatever asks"
