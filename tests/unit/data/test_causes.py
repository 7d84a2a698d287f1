"""A file that is not read: the message names what it is and what to do, in one line."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import save

from raysft.config.schema import Source
from raysft.data import sources
from raysft.errors import UserError

ASR = {"task_type": "asr", "wav_path": "a.wav", "text": "hello"}
MOST = {"instruction": "Transcribe.", "input": "[Hu7][Hu90]", "output": "HI"}


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def said(tmp_path: Path, name: str, content: bytes, form: str = "auto") -> str:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        source = sources.resolve(Source(path=str(file), format=form), "train", "data.train[3]")
        found = list(sources.scan(source, file))
        assert all(item.example is None for item in found)
        raise UserError(f"data.train[3]: {found[0].error}")
    text = str(caught.value)
    assert text.startswith("data.train[3]: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("form", ["auto", "ming_jsonl", "most_json"])
def test_another_encoding_is_named_with_the_command_that_converts_it(
    tmp_path: Path, code: str, form: str
) -> None:
    text = said(tmp_path, "t.jsonl", lines(ASR, ASR).decode().encode(code), form)
    if code == "utf-32-be":  # without a mark
        assert "is UTF-32BE text, expected UTF-8: iconv -f UTF-32BE" in text
    else:
        assert f"is {code[:6].upper()} text, expected UTF-8: iconv -f {code[:6].upper()}" in text
    assert "expected" in text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.csv",
            b"clip,said\na.wav,hello\nb.wav,x\n",
            "a table with commas .*clip, said.*columns",
        ),
        ("a.tsv", b"who\tclip\tsaid\n1\ta.mp3\thi\n", "a table with tabs .*columns"),
        ("metadata.csv", b"LJ1|hello|hello\nLJ2|x|x\n", "a table with bars"),
        ("a.h5", b"\x89HDF\r\n" + bytes(50), "is HDF5, which is not read"),
        ("a.jsonl.xz", lzma.compress(lines(ASR)), r"packed by xz: unpack it \(unxz\)"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
        ("clips.scp", b"utt1 /data/a.wav\nutt2 /data/b.wav\n", "a list of Kaldi's"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>", "an HTML page"),
        ("a.safetensors", save({"a": np.zeros(9)}), "a binary file"),
        ("a.jsonl", b"{'task_type': 'asr'}\n", "single quotes, JSON has double ones"),
        ("a.jsonl", b'{"task_type": "asr", "text": None}\n', "Python's None, JSON has null"),
        ("a.jsonl", b'{"task_type": "asr", "text": "x",}\n', "a comma stands before a closing"),
        ("a.jsonl", lines(ASR).replace(b"}\n", b"},\n") * 3, "line 1: .*a comma follows the obj"),
        ("a.jsonl", lines(MOST).replace(b"}\n", b"},\n") * 3, "item 1: .*a comma follows the obj"),
        ("a.json", b'[{"instruction": "a", "output": "b",}]', "item 1: .*a comma stands before"),
        ("a.jsonl", b" \n\n ", "nothing but white space"),
        ("a.txt", b"x" * 70_000, "first line is longer than 64 KiB"),
        ("a.jsonl", lines(ASR).decode().encode("utf-32-le"), "UTF-32LE text, .*-f UTF-32LE"),
        ("a.json", json.dumps([ASR, ASR]).encode(), r"those of ming_jsonl, .*jq -c '\.\[\]'"),
        ("a.json", json.dumps([ASR] * 2000, indent=2).encode(), r"jq -c '\.\[\]'"),
        ("a.jsonl", json.dumps(ASR, indent=1).encode() * 2, r"those of ming_jsonl, .*jq -c '\.'"),
        ("a.jsonl", lines(ASR, ASR).replace(b"\n", b"\r"), r"end with \\r alone, .*tr '\\r' '\\n'"),
        ("a.jsonl", lines(ASR).replace(b"hello", b"h\xe9"), "not in UTF-8 .*iconv -f CODE"),
        ("a.csv", b"clip,said\na.wav,h\xe9\n", "not in UTF-8"),
        ("a.json", json.dumps([{"foo": "y" * 70_000}]).encode(), r"no whole record.*seen: foo\)"),
        ("a.json", json.dumps({"x": [{"a": "y" * 99}] * 2000}).encode(), "no whole record"),
        ("a.json", json.dumps([["é", "b"]] * 9000, ensure_ascii=False).encode(), "no whole record"),
        ("a.json", b'[\n {"a": 1,\n "b" 2}\n]', "begins like JSON, but Expecting ':' delimiter"),
        ("a.json", b'[{"a" 1}, ' + b'"x", ' * 20_000, "begins like JSON, but Expecting ':'"),
        ("a.yaml", b"data:\n  train: [x]\n", "it is YAML, not data"),
    ],
)
def test_what_a_file_is_instead_is_named(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        raise UserError(said(tmp_path, name, content))


@pytest.mark.parametrize(
    "content", [json.dumps(MOST, indent=1).encode() * 2, lines(MOST, MOST).replace(b"\n", b"\r")]
)
def test_objects_in_a_row_are_told_to_go_one_a_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"item 0 .*one list, one object, or an object a line, wit"):
        list(sources.scan(sources.resolve(Source(path=str(file)), "train"), file))


def test_numbers_are_no_text_in_another_encoding(tmp_path: Path) -> None:
    for kind in ("<i4", ">i4", "<f4", "<i2"):
        content = np.arange(5000).astype(kind).tobytes()
        assert "is a binary file" in said(tmp_path, "a.bin", content)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "aiff"])
def test_audio_given_as_data_is_named(tmp_path: Path, suffix: str) -> None:
    soundfile.write(tmp_path / f"x.{suffix}", np.zeros(16000), 16000)
    content = (tmp_path / f"x.{suffix}").read_bytes()
    assert "is an audio file: data files list clips" in said(tmp_path, f"a.{suffix}", content)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a", "response": "b"}, "pairs .*: name them instruction and output"),
        (
            {"sentence": "x", "clip": "y"},
            r"a text \(sentence\) and name no clip .*: sentence, clip",
        ),
        ({"wav": "a.wav", "words": "y"}, r"a clip \(wav\) and have no text .*fields: wav, words"),
        ({"foo": "x"}, "its records have the fields foo"),
    ],
)
@pytest.mark.parametrize("shape", ["lines", "list"])
def test_records_of_other_programs_are_named_with_what_to_do(
    tmp_path: Path, record: dict[str, object], says: str, shape: str
) -> None:
    content = lines(record) if shape == "lines" else json.dumps([record], indent=2).encode()
    text = said(tmp_path, "a.json", content)
    with pytest.raises(UserError, match=says):
        raise UserError(text)
    assert "ming_jsonl, most_json, " in text


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ("espnet", "near is kaldi"),
        ("alpaca", "near is most_json"),
        ("ming_json", "did you mean ming_jsonl?"),
        ("xml", "there are: auto, aishell, clip_folder, clips_jsonl, dialog, drama, emilia, "),
    ],
)
def test_a_format_there_is_not_names_the_nearest(tmp_path: Path, form: str, says: str) -> None:
    assert says in said(tmp_path, "a.jsonl", lines(ASR), form)


@pytest.mark.parametrize("record", [ASR, MOST], ids=["ming", "most"])
@pytest.mark.parametrize("first", [100, 70_000, 3_000_000])
def test_a_long_first_line_does_not_hide_the_format(
    tmp_path: Path, record: dict[str, object], first: int
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf\n" + lines({"note": "x" * first, **record}, record, record))
    source = sources.resolve(Source(path=str(file)), "train")
    assert source.format == ("ming_jsonl" if record is ASR else "most_json")
    found = list(sources.scan(source, file))
    assert [item.line for item in found] == [2, 3, 4]
    assert all(item.example for item in found)


CUTS = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\\", b"\0", b"\xff", b"null", b"1e999")


@pytest.mark.parametrize("count", [150, pytest.param(5_000, marks=pytest.mark.slow)])
def test_mutated_files_give_examples_or_one_line_each(tmp_path: Path, count: int) -> None:
    """Whatever was done to a file of any shape, reading it raises nothing but UserError."""
    rng = random.Random(count)
    shapes = [
        lines(ASR, {**ASR, "id": "é\ud83d\ude00"}, ASR),
        lines(MOST, MOST, MOST),
        json.dumps([MOST, MOST, MOST]).encode(),
        json.dumps([MOST, MOST], indent=1).encode(),
        json.dumps({"version": [1], "data": [MOST, MOST]}).encode(),
        json.dumps(MOST, indent=2).encode(),
    ]
    file = tmp_path / "a.jsonl"
    read = refused = 0
    for _ in range(count):
        content = rng.choice(shapes)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(content))
            cut = rng.choice([0, 1, 1, 5, 50, len(content)])
            put = rng.choice(CUTS) if rng.random() < 0.7 else rng.randbytes(3)
            content = content[:at] + put + content[at + cut :]
        if rng.random() < 0.1:
            content = content.decode("latin-1").encode(rng.choice(["utf-16", "utf-32", "utf-8"]))
        file.write_bytes(content)
        form = rng.choice(["auto", "auto", "ming_jsonl", "most_json"])
        try:
            source = sources.resolve(Source(path=str(file), format=form), "train")
            shape = sources.get(source.format)
            chunks = shape.survey(file).chunks
            found = [item for chunk in chunks for item in sources.scan(source, file, chunk)]
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        for item in found:
            assert (item.example is None) != (item.error is None)
            assert item.example is not None or "\n" not in str(item.error)
            read += item.example is not None
    assert read > count // 5
    assert refused > count // 20
