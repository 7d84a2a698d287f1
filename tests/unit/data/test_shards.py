"""Shards of Parquet: read by place, without touching audio for lengths; what is damaged costs its
rows and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from raysft.config.prepare import Prepare
from raysft.config.schema import Source
from raysft.data.clips import audio
from raysft.data.clips.audio import Limits
from raysft.data.example import Audio, Cell, Example, Within
from raysft.data.index.build import Index, build_index
from raysft.errors import BadExample, UserError
from raysft.prepare import plan, shard
from tests.support.indexes import Encoder
from tests.support.layouts import RATE, Utterance, corpus

US = corpus(8)


def examples(folder: Path, us: list[Utterance] = US) -> list[tuple[Example, str]]:
    found = []
    folder.mkdir(parents=True, exist_ok=True)
    for u in us:
        path = folder / f"{u.id}.flac"
        path.write_bytes(u.encoded())
        clip = Audio(str(path))
        found.append(
            (Example(u.id, "asr", (clip,), (u.text,), text=u.text, speaker=u.speaker), "x")
        )
    return found


def made(tmp_path: Path, **settings: object) -> Path:
    """A shard of the corpus."""
    path = tmp_path / "000000.parquet"
    found = shard.make(examples(tmp_path / "clips"), Prepare(path="x", **settings), Limits())
    assert not found.rejected
    shard.write(path, found.columns)
    return path


def indexed(path: Path, folder: Path) -> Index:
    return build_index([Source(path=str(path))], "train", Encoder(), folder, workers=1)


def clips(index: Index) -> dict[str, Audio]:
    return {one.id: one.audio()[0] for one in index.examples(np.arange(len(index)))}


def sound(clip: Audio) -> np.ndarray:
    return np.round(audio.load(clip, RATE) * 32768).astype(np.int16)


@pytest.mark.parametrize("group", [shard.GROUP_BYTES, 40_000])
def test_places_are_where_pyarrow_finds_the_bytes(
    tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "GROUP_BYTES", group)
    path = made(tmp_path)
    assert (pq.ParquetFile(path).num_row_groups > 1) == (group < 1 << 20)
    table = pq.read_table(path)
    assert table.schema.names[:10] == [
        *("utt", "wav", "audio_data", "text", "spk", "utt_embedding", "spk_embedding"),
        *("speech_token", "seconds", "tokens"),
    ]
    found = clips(indexed(path, tmp_path / "index"))
    content = path.read_bytes()
    for row in table.to_pylist():
        held = found[row["utt"]].held
        assert isinstance(held, Within)
        assert content[held.offset : held.offset + held.size] == row["audio_data"]
        assert row["seconds"] == row["samples"] / row["sample_rate"]
    for u in US:
        assert np.array_equal(sound(found[u.id]), u.samples)


def test_lengths_come_from_the_columns_and_no_clip_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path)

    def opened(*_: object) -> None:
        raise AssertionError("a clip was opened")

    monkeypatch.setattr(audio, "open_track", opened)
    index = indexed(path, tmp_path / "index")
    assert index.seconds.tolist() == pytest.approx([len(u.samples) / RATE for u in US])


def test_others_shards_are_read_by_groups_of_rows(tmp_path: Path) -> None:
    """As CosyVoice's preparation writes them: snappy, ten columns."""
    columns = {
        "utt": [u.id for u in US],
        "audio_data": [u.encoded("WAV") for u in US],
        "wav": [f"/gone/{u.id}.wav" for u in US],
        "text": [u.text for u in US],
        "spk": [u.speaker for u in US],
        "speech_token": [[1, 2]] * len(US),
    }
    path = tmp_path / "parquet_000000000.tar"
    pq.write_table(pa.table(columns), path, row_group_size=3)
    (tmp_path / "data.list").write_text(f"{path}\n")
    index = indexed(tmp_path / "data.list", tmp_path / "index")
    assert index.described[0]["format"] == "shards"
    found = clips(index)
    assert all(isinstance(clip.held, Cell) for clip in found.values())
    for u in US:
        assert np.array_equal(sound(found[u.id]), u.samples)


def test_a_damaged_clip_costs_its_row_by_id(tmp_path: Path) -> None:
    path = made(tmp_path)
    found = clips(indexed(path, tmp_path / "index"))
    held = found[US[3].id].held
    assert isinstance(held, Within)
    content = bytearray(path.read_bytes())
    content[held.offset : held.offset + held.size] = bytes(held.size)
    path.write_bytes(content)
    for u in US:
        if u.id == US[3].id:
            with pytest.raises(BadExample, match=rf"000000\.parquet::{u.id}: not audio"):
                audio.load(found[u.id], RATE)
        else:
            assert np.array_equal(sound(found[u.id]), u.samples)


def test_a_shard_that_is_cut_off_costs_its_rows_by_id(tmp_path: Path) -> None:
    first = made(tmp_path)
    second = first.with_name("000001.parquet")
    more = [Utterance(f"more{n}", "s", "x", u.samples) for n, u in enumerate(US)]
    found = shard.make(examples(tmp_path / "more", more), Prepare(path="x"), Limits())
    shard.write(second, found.columns)
    (tmp_path / "data.list").write_text(f"{first}\n{second}\n")
    first.write_bytes(first.read_bytes()[:5000])
    index = indexed(tmp_path / "data.list", tmp_path / "index")
    assert set(clips(index)) == {u.id for u in more}
    assert sorted(item.id for item in index.rejected) == sorted(u.id for u in US)
    assert "its shard is damaged" in index.rejected[0].reason
    first.with_suffix(".ids").unlink()
    with pytest.raises(UserError, match=r"000000\.parquet: damaged, or no Parquet"):
        indexed(tmp_path / "data.list", tmp_path / "other")


def test_a_list_that_moved_with_its_shards_is_found(tmp_path: Path) -> None:
    (tmp_path / "a" / "shards").mkdir(parents=True)
    path = made(tmp_path).rename(tmp_path / "a" / "shards" / "000000.parquet")
    (tmp_path / "a" / "data.list").write_text(f"{path}\n")
    moved = (tmp_path / "a").rename(tmp_path / "b")
    assert len(indexed(moved, tmp_path / "index")) == len(US)


@pytest.mark.parametrize(
    ("settings", "kind", "rate"),
    [
        ({"audio": "flac"}, "FLAC", RATE),
        ({"audio": "flac", "rate": 8000}, "FLAC", 8000),
        ({"audio": "opus"}, "OGG", RATE),
        ({"audio": "keep", "rate": 8000}, "FLAC", 8000),
    ],
)
def test_clips_are_written_anew_as_asked(
    tmp_path: Path, settings: dict[str, object], kind: str, rate: int
) -> None:
    path = made(tmp_path, **settings)
    row = pq.read_table(path).to_pylist()[2]
    file = soundfile.SoundFile(pa.BufferReader(row["audio_data"]))
    assert (file.format, row["sample_rate"]) == (kind, rate)
    wanted = audio.load(str(tmp_path / "clips" / f"{US[2].id}.flac"), rate)
    got = file.read(dtype="float32")
    assert abs(len(got) - len(wanted)) <= (rate // 50 if kind == "OGG" else 0)
    if kind == "FLAC":
        assert np.abs(got - np.clip(wanted, -1, 1)).max() < 1 / 32000
    index = indexed(path, tmp_path / "index")
    assert index.seconds[2] == pytest.approx(row["seconds"])
    assert len(audio.load(clips(index)[US[2].id], RATE)) == pytest.approx(len(US[2].samples), abs=2)


def test_shards_are_cut_by_rows_or_by_size(tmp_path: Path) -> None:
    class Column:
        seconds = np.array([1.0, 1.0, 5.0, 0.5, 0.5, 0.5], np.float32)

        def __len__(self) -> int:
            return len(self.seconds)

    index: Index = Column()  # type: ignore[assignment]
    assert plan.cuts(index, Prepare(rows=4)) == [(0, 4), (4, 6)]
    mib = 2.2 * plan.BYTES_A_SECOND / (1 << 20)
    assert plan.cuts(index, Prepare(rows=10, mib=mib)) == [(0, 2), (2, 3), (3, 6)]
    assert plan.cuts(index, Prepare(rows=1, mib=mib)) == [(n, n + 1) for n in range(6)]


def test_what_is_no_clip_with_a_text_costs_its_row(tmp_path: Path) -> None:
    (good, source), *_ = examples(tmp_path / "clips")
    two = Example("two", "asr", (*good.input, *good.input), ("x",), text="x")
    gone = Example("gone", "asr", (Audio(f"{tmp_path}/none.wav"),), ("x",), text="x")
    found = shard.make([(good, source), (two, "x"), (gone, "x")], Prepare(path="x"), Limits())
    assert found.columns["utt"] == [good.id]
    assert [(one.id, one.kind) for one in found.rejected] == [
        ("two", "not one clip"),
        ("gone", "missing"),
    ]
