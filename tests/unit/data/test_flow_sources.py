"""Sources of clips with speech tokens and embeddings: JSON lines, lists of units, and shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysft.config.schema import Data, Model, Source
from raysft.data import sources
from raysft.data.encode import make_encoder
from raysft.data.example import Example, Units
from raysft.data.index.build import build_index
from raysft.errors import BadExample
from tests.support import flows


def parsed(path: Path, line: str, task: str | None = None) -> Example:
    source = sources.resolve(Source(path=str(path), task=task), "train", "data.train[0]")
    return sources.get(source.format).parse(line.encode(), path, 1, task)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_json_lines_give_clip_tokens_and_embedding(tmp_path: Path) -> None:
    record = {"utt": "u1", "wav": "a.wav", "text": "hi", "spk": "s", "speech_token": [3, 1, 3]}
    line = json.dumps(record | {"spk_embedding": [0.5, -1, 2]})
    found = parsed(write(tmp_path / "x.jsonl", line), line)
    assert (found.id, found.task, found.speaker) == ("u1", "flow", "s")
    assert found.input == (Units((3, 1, 3)),)
    assert [clip.path for clip in found.audio()] == [str(tmp_path / "a.wav")]
    assert found.voice == (0.5, -1.0, 2.0)
    bare = json.dumps({"id": 7, "audio_path": "/b.wav", "utt_embedding": [1.0]})
    found = parsed(write(tmp_path / "y.jsonl", bare), bare, "dub")
    assert (found.id, found.task, found.input, found.voice) == ("7", "dub", (), (1.0,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speech_token": [1, 2.5]}, "'speech_token' is no list of whole numbers"),
        ({"speech_token": "1 2"}, "'speech_token' is a text, expected a list"),
        ({"spk_embedding": ["x"]}, "'spk_embedding' is no list of numbers"),
        ({"wav": 3}, "'wav' is a number"),
        ({"start": 1.5}, "says which part of a clip"),
    ],
)
def test_json_lines_that_are_wrong_say_where(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    right = {"wav": "a.wav", "speech_token": [1], "spk_embedding": [1.0]}
    path = write(tmp_path / "x.jsonl", json.dumps(right))
    with pytest.raises(BadExample, match=said):
        parsed(path, json.dumps(right | changes))


def test_a_list_of_units_repeats_each_as_long_as_it_lasts(tmp_path: Path) -> None:
    path = write(tmp_path / "train.txt", "wavs/a.wav|17 9 402|3 1 2", "b.wav|5 6")
    found = parsed(path, "wavs/a.wav|17 9 402|3 1 2")
    assert found.input == (Units((17, 17, 17, 9, 402, 402)),)
    assert [clip.path for clip in found.audio()] == [str(tmp_path / "wavs" / "a.wav")]
    assert (found.id, found.task, found.voice) == ("train:1", "flow", ())
    assert parsed(path, "b.wav|5 6").input == (Units((5, 6)),)
    with pytest.raises(BadExample, match="3 units and 2 durations"):
        parsed(path, "a.wav|1 2 3|1 1")
    with pytest.raises(BadExample, match=r"no row of path\|units\|durations"):
        parsed(path, "a.wav|one two")


def shard(folder: Path) -> Path:
    """As CosyVoice's preparation writes it: four utterances, the third without an embedding."""
    path = flows.corpus(folder / "clips", "one", 4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [
        {
            "utt": line["id"],
            "wav": line["wav"],
            "audio_data": (path.parent / line["wav"]).read_bytes(),
            "text": "some words",
            "spk": "s1",
            "utt_embedding": [9.0] * flows.SPEAKER,
            "spk_embedding": line["spk_embedding"],
            "speech_token": line["speech_token"],
        }
        for line in lines
    ]
    rows[2] |= {"utt_embedding": [], "spk_embedding": []}
    rows[3] |= {"spk_embedding": []}
    pq.write_table(pa.Table.from_pylist(rows), folder / "00.parquet")
    (folder / "data.list").write_text("00.parquet\n")
    return folder / "data.list"


def test_shards_give_tokens_and_embeddings_to_who_asks_for_them(tmp_path: Path) -> None:
    listed = shard(tmp_path)
    model = Model(**flows.model("one"))
    encoder = make_encoder(model, Data(mode="padded"), tmp_path)
    given = [Source(path=str(listed), task="flow")]
    index = build_index(given, "train", encoder, tmp_path / "index", workers=1)
    found = {one.id: one for one in index.examples(np.arange(len(index)))}
    assert set(found) == {"f0", "f1", "f3"}
    (rejected,) = index.rejected
    assert rejected.id == "f2" and "no speaker embedding" in rejected.reason
    lines = (tmp_path / "clips" / "one.jsonl").read_text().splitlines()
    expected = {line["id"]: line for line in map(json.loads, lines)}
    for name in ("f0", "f1"):
        assert found[name].input == (Units(tuple(expected[name]["speech_token"])),)
        np.testing.assert_allclose(found[name].voice, expected[name]["spk_embedding"], rtol=1e-6)
    assert set(found["f3"].voice) == {9.0}  # that of the utterance
    assert index.tokens.tolist() == [6, 12, 24]
    # Of the same shards an ASR run is given the text, from a listing of its own.
    plain = sources.resolve(Source(path=str(listed)), "train", "data.train[0]")
    record = next(iter(sources.get(plain.format).records(tmp_path / "00.parquet", plain.given)))
    assert "flow" not in record and record["text"] == "some words"
