"""Corpora as messy as people have them: each record is read right, or said in a line; none is lost
in silence."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from raysft import paths
from raysft.config.schema import Source
from raysft.data.clips import audio
from raysft.data.index.build import Index, build_index
from raysft.data.sources.interleaved import Interleaved
from raysft.errors import UserError
from tests.support.indexes import Encoder
from tests.support.layouts import RATE, corpus, jsonl, tar, written

US = corpus()
FLACS = [u.encoded() for u in US]
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def indexed(path: Path, index: Path, **entry: Any) -> Index:
    return build_index([Source(path=str(path), **entry)], "train", Encoder(), index, workers=1)


def heard(index: Index) -> dict[str, tuple[str | None, int | None]]:
    """id -> text, and which of US its samples are (None: of none)."""
    found = {}
    for example in index.examples(np.arange(len(index))):
        (clip,) = example.audio()
        got = np.round(audio.load(clip, RATE) * 32768).astype(np.int16)
        number = next((n for n, u in enumerate(US) if np.array_equal(u.samples, got)), None)
        found[example.id] = example.text, number
    return found


def reasons(index: Index) -> str:
    return "\n".join(item.reason for item in index.rejected)


def refusal(path: Path, index: Path, **entry: Any) -> str:
    with pytest.raises(UserError) as error:
        indexed(path, index, **entry)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- archives


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ([("a.flac", FLACS[0]), ("a.meta.json", b"{}"), ("a.txt", b"hi")], {"a": ("hi", 0)}),
        ([("A.FLAC", FLACS[0]), ("A.TXT", b"\xef\xbb\xbfhi\r\n")], {"A": ("hi", 0)}),
        ([("a.audio.flac", FLACS[0]), ("a.txt", b"hi")], {"a": ("hi", 0)}),
        (
            [("B.1.flac", FLACS[0]), ("B.1.txt", b"x"), ("B.2.flac", FLACS[1]), ("B.2.txt", b"y")],
            {"B.1": ("x", 0), "B.2": ("y", 1)},
        ),
        (
            [("._a.flac", b"x"), ("a.flac", FLACS[0]), ("._a.txt", b"x"), ("a.txt", b"hi")],
            {"a": ("hi", 0)},
        ),
    ],
)
def test_records_of_an_archive_are_those_of_its_own_tools(
    tmp_path: Path, members: list[tuple[str, bytes]], found: object
) -> None:
    assert heard(indexed(tar(tmp_path / "a.tar", members), tmp_path / "i")) == found


def two(path: Path) -> bytes:
    members = [("a.flac", FLACS[0]), ("a.txt", b"hi"), ("b.flac", FLACS[1]), ("b.txt", b"ho")]
    return tar(path, members).read_bytes()


def test_an_archive_that_is_damaged_in_its_middle_is_no_shorter_one(tmp_path: Path) -> None:
    whole = two(tmp_path / "a.tar")
    second = whole.index(b"b.flac")
    damaged = whole[:second] + b"\xff" * 20 + whole[second + 20 :]
    for wrong, says in (
        (damaged, "cut off or damaged at byte"),
        (whole[: second + 200], "cut off or damaged at byte"),
        (whole[: second + 2000], "cut off"),
        (whole + whole, "something follows its end"),
    ):
        (tmp_path / "a.tar").write_bytes(wrong)
        assert says in refusal(tmp_path / "a.tar", tmp_path / "i")


def test_a_text_twice_and_a_link_are_said(tmp_path: Path) -> None:
    members = [("a.txt", b"1"), ("a.txt", b"2"), ("a.flac", FLACS[0])]
    path = tar(tmp_path / "a.tar", [*members, ("b.flac", FLACS[1]), ("b.txt", b"ho")])
    index = indexed(path, tmp_path / "i")
    assert "a.txt is in it twice" in reasons(index)
    assert heard(index) == {"b": ("ho", 1)}
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("c.flac")
        link.type, link.linkname = tarfile.LNKTYPE, "a.flac"
        archive.addfile(link)
        text = tarfile.TarInfo("c.txt")
        text.size = 2
        archive.addfile(text, io.BytesIO(b"hi"))
    assert "c.flac is a link to a.flac" in refusal(path, tmp_path / "i")


def test_tarred_manifests_find_their_own_member(tmp_path: Path) -> None:
    """shard_id is the number in a name; of members of one name the one that is named."""
    tar(tmp_path / "audio_1.tar", [("x.flac", FLACS[0])])
    tar(tmp_path / "audio_2.tar", [("a/x.flac", FLACS[1]), ("b/x.flac", FLACS[2])])
    names = ["x.flac", "b/x.flac", "/far/b/x.flac", "x.flac", "x.flac"]
    records = [
        {"audio_filepath": name, "text": "t", "shard_id": shard, "id": str(n)}
        for n, (name, shard) in enumerate(zip(names, [1, "2", 2, [1], 3]))
    ]
    manifest = jsonl(tmp_path / "m.json", records)
    index = indexed(manifest, tmp_path / "i", tars="audio_{1..2}.tar")
    assert heard(index) == {"0": ("t", 0), "1": ("t", 2)}
    assert "/far/b/x.flac is in its tars more than once" in reasons(index)
    assert "'shard_id' is [1], expected a number" in reasons(index)
    assert "shard_id is 3, and tars names the archives 1 to 2" in reasons(index)


def test_a_range_that_counts_down_is_said(tmp_path: Path) -> None:
    assert "{5..2} holds nothing" in refusal(tmp_path / "{5..2}.tar", tmp_path / "i")


def test_an_archive_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    """Its examples could not be told apart."""
    two(tmp_path / "a.tar")
    (tmp_path / "s.list").write_text("a.tar\n./a.tar\n")
    assert "a.tar is named twice" in refusal(tmp_path / "s.list", tmp_path / "i")


# --- Parquet and Arrow


def arrow(path: Path, table: pa.Table, **options: Any) -> Path:
    with pa.ipc.new_file(
        str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)
    ) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_row_without_bytes_is_the_file_its_path_names(tmp_path: Path, kind: str) -> None:
    written(tmp_path, US)
    names = [f"{u.id}.flac" for u in US]
    cells = [
        {"bytes": FLACS[0], "path": "elsewhere.flac"},
        {"bytes": None, "path": names[1]},
        None,
        {"bytes": FLACS[3], "path": None},
        {"bytes": None, "path": "gone.flac"},
    ]
    table = pa.table({"audio": pa.array(cells, AUDIO), "text": [u.text for u in US]})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    else:
        arrow(tmp_path / "x.arrow", table)
    index = indexed(tmp_path / f"x.{kind}", tmp_path / "i")
    assert heard(index) == {f"x:{n + 1}": (US[n].text, n) for n in (0, 1, 3)}
    assert "column 'audio' holds no path" in reasons(index)
    assert "gone.flac: no such file" in reasons(index)


def test_columns_of_any_encoding_and_name(tmp_path: Path) -> None:
    written(tmp_path, US)
    texts = pa.array([u.text for u in US])
    paths = pa.array([f"{u.id}.flac" for u in US]).dictionary_encode()
    wanted = {f"x:{n + 1}": (u.text, n) for n, u in enumerate(US)}
    pq.write_table(
        pa.table({"audio": paths, "text": texts.dictionary_encode()}), tmp_path / "x.parquet"
    )
    assert heard(indexed(tmp_path / "x.parquet", tmp_path / "i")) == wanted
    pq.write_table(pa.table({"my.audio": FLACS, "text": texts}), tmp_path / "x.parquet")
    columns = {"audio": "my.audio"}
    assert heard(indexed(tmp_path / "x.parquet", tmp_path / "i", columns=columns)) == wanted


def test_damage_is_the_file_s_and_is_not_waited_for(tmp_path: Path) -> None:
    """patience takes an error without a number for the storage's otherwise."""
    table = pa.table({"audio": FLACS, "text": [u.text * 50 for u in US]})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path)
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    assert "x.parquet: damaged, or no Parquet" in refusal(path, tmp_path / "i")
    cut = arrow(tmp_path / "x.arrow", table, compression="lz4")
    assert "its buffers are compressed" in refusal(cut, tmp_path / "i")


# --- lhotse


def cuts(folder: Path) -> list[Any]:
    """Of a stereo recording: each channel, both, and two of one id."""
    from lhotse import MonoCut, MultiCut, Recording, SupervisionSegment

    folder.mkdir()
    samples = np.random.default_rng(3).normal(0, 0.1, (3 * RATE, 2))
    soundfile.write(folder / "talk.wav", samples, RATE)
    talk = Recording.from_file(folder / "talk.wav")
    said = [SupervisionSegment("s", talk.id, 0.0, 1.0, text="hi")]
    return [
        MonoCut("left", 0.5, 1.0, 0, said, recording=talk),
        MonoCut("right", 0.5, 1.0, 1, said, recording=talk),
        MultiCut("both", 1.0, 1.0, [0, 1], said, recording=talk),
        MonoCut("again", 0.0, 1.0, 1, said, recording=talk),
        MonoCut("again", 2.0, 1.0, 0, said, recording=talk),
    ]


@pytest.mark.parametrize("shar", [False, True])
def test_cuts_are_heard_as_lhotse_loads_them(tmp_path: Path, shar: bool) -> None:
    from lhotse import CutSet
    from lhotse.shar import SharWriter

    made = cuts(tmp_path / "d")
    path = tmp_path / "shar" if shar else tmp_path / "cuts.jsonl"
    if shar:
        path.mkdir()
        with SharWriter(str(path), fields={"recording": "wav"}, shard_size=10) as writer:
            for cut in made:
                writer.write(cut)
    else:
        path.write_text("".join(json.dumps(cut.to_dict()) + "\n" for cut in made))
    read = CutSet.from_shar(in_dir=str(path)) if shar else made
    index = indexed(path, tmp_path / "i")
    examples = index.examples(np.arange(len(index)), named=False)
    assert sorted(example.id for example in examples) == sorted(cut.id for cut in made)
    left = list(examples)
    for cut in read:
        wanted = cut.load_audio().mean(axis=0)
        near = [
            example
            for example in left
            if example.id == cut.id
            and np.abs(audio.load(example.audio()[0], RATE) - wanted).max() < 1e-3
        ]
        assert near, cut.id
        left.remove(near[0])


def test_a_shar_cut_of_less_than_its_recording_is_that_part(tmp_path: Path) -> None:
    from lhotse import CutSet

    made = CutSet.from_cuts(cuts(tmp_path / "d")[:2])
    (tmp_path / "shar").mkdir()
    made.to_shar(str(tmp_path / "shar"), fields={"recording": "wav"}, shard_size=2)
    manifest = tmp_path / "shar" / "cuts.000000.jsonl.gz"
    records = [json.loads(line) for line in gzip.decompress(manifest.read_bytes()).splitlines()]
    for record in records:
        record |= {"start": 0.25, "duration": 0.5}
        record["supervisions"][0]["duration"] = 0.5
    with gzip.open(manifest, "wt") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
    index = indexed(tmp_path / "shar", tmp_path / "i")
    found = {one.id: audio.load(one.audio()[0], RATE) for one in index.examples(np.arange(2))}
    for cut in CutSet.from_shar(in_dir=str(tmp_path / "shar")):
        wanted = cut.load_audio()[0]
        assert found[cut.id].shape == wanted.shape
        assert np.abs(found[cut.id] - wanted).max() < 1e-3


def test_texts_that_reach_beyond_their_cut_are_refused(tmp_path: Path) -> None:
    records = [cut.to_dict() for cut in cuts(tmp_path / "d")[:3]]
    records[1]["duration"] = 0.4
    records[2]["supervisions"] = [5]
    path = jsonl(tmp_path / "cuts.jsonl", records)
    index = indexed(path, tmp_path / "i")
    assert len(index) == 1
    assert "from 0 to 1 s, of which not all is heard" in reasons(index)
    assert "'supervisions' is no list of objects" in reasons(index)


# --- folders, tables and lists


def test_folders_behind_links_and_endings_in_capitals_are_read(tmp_path: Path) -> None:
    top = tmp_path / "data"
    for folder, name, n in (("far", "z.flac", 1), ("data/s p", "ä ö.FLAC", 0)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_bytes(FLACS[n])
        (tmp_path / folder / name).with_suffix(".TXT").write_text("hi")
    os.symlink(tmp_path / "far", top / "link")
    os.symlink(top, tmp_path / "far" / "round")
    found = heard(indexed(top, tmp_path / "i"))
    assert found == {"s p_ä ö": ("hi", 0), "link_z": ("hi", 1)}


def test_librispeech_with_other_endings_tabs_and_clips_that_come_later(tmp_path: Path) -> None:
    chapter = tmp_path / "data" / "84" / "1"
    chapter.mkdir(parents=True)
    for name, n in (("84-1-0.FLAC", 0), ("84-1-9.flac", 1)):
        (chapter / name).write_bytes(FLACS[n])
    (chapter / "84-1.trans.txt").write_text("84-1-0\tHI YOU\n84-1-1 HO\n")
    os.utime(chapter / "84-1.trans.txt", (1e9, 1e9))
    os.utime(chapter, (1e9, 1e9))
    index = indexed(tmp_path / "data", tmp_path / "i")
    assert heard(index) == {"84-1-0": ("HI YOU", 0)}
    assert "no clip 84-1-1.flac beside its transcript" in reasons(index)
    assert "has no line in 84-1.trans.txt" in reasons(index)
    (chapter / "84-1-1.flac").write_bytes(FLACS[2])
    assert heard(indexed(tmp_path / "data", tmp_path / "i"))["84-1-1"] == ("HO", 2)


def test_kaldi_s_paths_begin_where_the_command_runs_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that was made elsewhere is made again; what has no text is said."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "wav.scp").write_text(f"a wav/{US[0].id}.flac\nb wav/{US[1].id}.flac\n")
    (data / "text").write_text("a hi\n")
    written(tmp_path / "here" / "wav", US[:2])
    for name in ("wav.scp", "text"):
        os.utime(data / name, (1e9, 1e9))
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refusal(data, tmp_path / "i")
    monkeypatch.chdir(tmp_path / "here")
    index = indexed(data, tmp_path / "i")
    assert heard(index) == {"a": ("hi", 0)}
    assert "b has no line in text" in reasons(index)


def test_a_table_s_field_may_hold_lines(tmp_path: Path) -> None:
    written(tmp_path, US[:3])
    names = [f"{u.id}.flac" for u in US[:3]]
    path = tmp_path / "m.csv"
    path.write_bytes(
        f'file_name,text\r\n{names[0]},"a\r\n\r\nb ""c"""\r\n\r\n{names[1]},x,y\r\n'
        f"{names[2]},z\r\n".encode()
    )
    index = indexed(path, tmp_path / "i")
    assert heard(index) == {"m:1": ('a\r\n\r\nb "c"', 0), "m:3": ("z", 2)}
    assert "has 3 columns, and the first line 2 (m.csv:6)" in reasons(index)
    path.write_text(f"file_name,text,text\n{names[0]},a,b\n")
    assert "two columns 'text'" in refusal(path, tmp_path / "i")
    path.write_text(f'file_name,text\n{names[0]},a\n{names[1]},"b\n')
    assert "m.csv:3: unexpected end of data" in refusal(path, tmp_path / "i")


def test_common_voice_s_clips_may_come_after_its_table(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text(f'client_id\tpath\tsentence\nc\t{US[0].id}.flac\tsay "hi\n')
    os.utime(path, (1e9, 1e9))
    assert "no such file" in refusal(path, tmp_path / "i")
    written(tmp_path / "clips", US[:1])
    assert heard(indexed(path, tmp_path / "i")) == {US[0].id: ('say "hi', 0)}


def test_a_faulty_entry_of_gigaspeech_costs_itself(tmp_path: Path) -> None:
    written(tmp_path, US[:1])
    end = len(US[0].samples) / RATE
    part = {"sid": "a", "begin_time": 0, "end_time": end, "text_tn": "HI <COMMA> YOU <PERIOD>"}
    path = tmp_path / "g.json"
    path.write_text(
        '\ufeff{"dataset": "G", "audios": [{"aid": "X", "segments": [{"begin_time": 0,}]}, 5, '
        + json.dumps({"aid": "A", "path": f"{US[0].id}.flac", "segments": [part, "b"]})
        + ', {"aid": "B", "segments": []}]}',
        encoding="utf-8",
    )
    index = indexed(path, tmp_path / "i")
    assert heard(index) == {"a": ("HI, YOU.", 0)}
    for says in ("audio 1", "found a number", "segment A:2: is a text", "'path' is missing"):
        assert says in reasons(index)


def test_a_faulty_segment_of_mustc_is_named(tmp_path: Path) -> None:
    written(tmp_path / "wav", US[:1], "wav")
    end = len(US[0].samples) / RATE
    path = tmp_path / "txt" / "t.yaml"
    path.parent.mkdir()
    good = f"- {{duration: {end}, offset: 0,\n    wav: {US[0].id}.wav}}\n"
    path.write_text(good + "- {duration: 1, offset: 0, wav: null}\n- hi\n")
    (tmp_path / "txt" / "t.en").write_text("hello\nb\nc\n")
    index = indexed(path, tmp_path / "i")
    assert heard(index) == {f"{US[0].id}_0": ("hello", 0)}
    assert "'wav' is null" in reasons(index)
    assert "is a text, expected {duration, offset, wav}" in reasons(index)
    assert "languages beside it: en;" in refusal(path, tmp_path / "i", columns={"text": "de"})
    path.write_text(good + "- {duration: [\n")
    assert "t.yaml:3 is no segment in YAML" in refusal(path, tmp_path / "i")


def test_a_folder_with_a_list_in_it_is_told_to_be_named_by_the_list(tmp_path: Path) -> None:
    written(tmp_path / "d", US[:1])
    (tmp_path / "d" / "metadata.csv").write_text(f"file_name,text\n{US[0].id}.flac,hi\n")
    said = refusal(tmp_path / "d", tmp_path / "i")
    assert "name the file that lists its examples (metadata.csv)" in said


def test_an_alignment_without_times_costs_its_utterance(tmp_path: Path) -> None:
    (tmp_path / "a.ctm").write_text("a 1 x 0.1 word\n")
    entries = {"tiers": {"words": {"entries": [["word"]]}}}
    good = [{"word": w, "start": n / 50, "end": (n + 1) / 50} for n, w in enumerate("abc")]
    path = jsonl(
        tmp_path / "x.jsonl",
        [
            {"id": "a", "units": "1 2 3", "alignment": "a.ctm"},
            {"id": "b", "units": "1 2 3", "alignment": entries},
            {"id": "c", "units": "1 2 3", "alignment": good},
        ],
    )
    with path.open("a") as stream:
        stream.write("{broken\n")
    found = list(Interleaved().records(path, Source(path=str(path))))
    assert [record["id"] for record in found if "fault" not in record] == ["c"]
    faults = str([record for record in found if "fault" in record])
    for says in ("a.ctm:1 has no two times", "no list of words", "x.jsonl:4: not valid JSON"):
        assert says in faults


@pytest.mark.parametrize("given", ["a b.flac", "./a b.flac"])
def test_paths_in_a_list_at_the_top_of_a_bucket(given: str) -> None:
    assert paths.of_data(given, "s3://bucket") == "s3://bucket/a b.flac"
    assert paths.of_data(given, "s3://bucket/x") == "s3://bucket/x/a b.flac"


def test_a_second_clip_of_a_record_is_not_left_unheard(tmp_path: Path) -> None:
    written(tmp_path, US[:2])
    one, other = f"{US[0].id}.flac", f"{US[1].id}.flac"
    path = jsonl(
        tmp_path / "m.jsonl",
        [
            {"file_name": one, "text": "a", "audio": other},
            {"file_name": one, "text": "b", "audio": f"./{one}"},
        ],
    )
    index = indexed(path, tmp_path / "i")
    assert heard(index) == {"m:2": ("b", 0)}
    assert f"field 'audio' names audio ('{other}') that would not be heard" in reasons(index)


@pytest.mark.parametrize(
    ("mark", "end", "says"),
    [(";", "\n", "semicolons .* write it with tabs or commas"), (",", "\r", "end with .r alone")],
)
def test_a_table_of_other_marks_is_said(tmp_path: Path, mark: str, end: str, says: str) -> None:
    rows = [("file_name", "text"), (f"{US[0].id}.flac", "hi")]
    path = tmp_path / "m.csv"
    path.write_bytes("".join(mark.join(row) + end for row in rows).encode())
    assert re.search(says, refusal(path, tmp_path / "i"))


def test_a_name_that_is_no_utf_8_is_shown(tmp_path: Path) -> None:
    top = tmp_path / "d"
    top.mkdir()
    for name, n in ((b"\xe9", 0), (b"b", 1)):
        for end, content in ((b".flac", FLACS[n]), (b".txt", b"hi")):
            Path(os.fsdecode(os.fsencode(top) + b"/" + name + end)).write_bytes(content)
    index = indexed(top, tmp_path / "i")
    assert heard(index) == {"b": ("hi", 1)}
    assert r"\udce9 is not in UTF-8: rename it" in reasons(index)
