"""Sources: what a path means, and what the bytes of an item become."""

from __future__ import annotations

import hashlib
import json
import os
import random

import pytest

from raysft.config.schema import Source
from raysft.data import sources
from raysft.data.example import Audio, Example, Units
from raysft.data.sources import json_items, json_lines
from raysft.data.sources.base import Chunk
from raysft.errors import BadExample, UserError

ASR = {"task_type": "asr", "wav_path": "a.wav", "text": "hello", "lang": "en"}
TTS = {"task_type": "tts", "wav_path": "a.wav", "text": "hello"}
SPEECH = "[Hu7][Hu90][Hu481]"
MOST = {"id": "x", "instruction": "Transcribe.", "input": SPEECH, "output": "HI", "metadata": {}}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records):
    return "".join(
        (record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records
    )


def located(path, split="train", **source):
    found = sources.resolve(Source(path=str(path), **source), split)
    return [item for file in found.files for item in sources.scan(found, file)]


def examples(path, **source):
    found = located(path, **source)
    assert [item.error for item in found] == [None] * len(found)
    return [item.example for item in found]


def reason(path, **source):
    (found,) = located(path, **source)
    assert found.example is None
    return found.error


# --- Ming-UniAudio JSON lines


def test_asr_reads_the_clip_and_answers_the_text(tmp_path):
    file = write(tmp_path / "train.jsonl", lines(ASR))
    clip = Audio(str(tmp_path / "a.wav"))
    assert examples(file) == [
        Example("train:1", "asr", (clip,), ("hello",), lang="en", text="hello")
    ]


def test_tts_reads_the_text_and_answers_the_clip(tmp_path):
    file = write(tmp_path / "train.jsonl", lines({**TTS, "id": 17, "lang": "en"}))
    clip = Audio(str(tmp_path / "a.wav"))
    found = Example("17", "tts", ("hello",), (clip,), text="hello", language="en")
    assert examples(file) == [found]


@pytest.mark.parametrize(
    ("given", "found"),
    [("/data/a.wav", "/data/a.wav"), ("b/a.wav", "{}/set/b/a.wav"), ("../a.wav", "{}/a.wav")],
)
def test_a_relative_clip_is_relative_to_the_files_folder(tmp_path, monkeypatch, given, found):
    file = write(tmp_path / "set/train.jsonl", lines({**ASR, "wav_path": given}))
    monkeypatch.chdir(file.parent)  # a relative path of the source must not matter either
    (example,) = examples("train.jsonl")
    assert example.audio() == [Audio(found.format(tmp_path))]


def test_the_sources_task_makes_tts_of_asr_lines_and_other_names_only_rename(tmp_path):
    file = write(tmp_path / "train.jsonl", lines(ASR))
    (example,) = examples(file, task="tts")
    assert (example.task, example.input, example.text) == ("tts", ("hello",), "hello")
    (example,) = examples(file, task="caption")
    assert (example.task, example.output) == ("caption", ("hello",))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({**ASR, "task_type": "vc"}, "task_type is 'vc'; supported: asr, tts, edit"),
        ({"wav_path": "a.wav", "text": "x"}, "task_type is null; supported"),
        ({"task_type": "asr", "text": "x"}, "'wav_path' is missing; fields found: task_type, text"),
        ({**ASR, "wav_path": ["a"]}, "'wav_path' is a list, expected a text"),
        ({**ASR, "text": " "}, "'text' is empty"),
        ({**ASR, "text": None}, "'text' is null, expected a text"),
        ({**ASR, "lang": 3}, "'lang' is a number"),
        ({**ASR, "id": {}}, "'id' is an object"),
        ({**ASR, "wav_path": "a\0.wav"}, "NUL"),
        ({**ASR, "text": "half \ud83d"}, "half a surrogate pair"),
    ],
)
def test_an_unusable_line_says_what_is_wrong_with_it(tmp_path, record, says):
    found = reason(write(tmp_path / "train.jsonl", lines(record)), format="ming_jsonl")
    assert found.startswith("train.jsonl line 1: ")
    assert says in found


def test_lines_that_do_not_parse_are_named_and_the_rest_goes_on(tmp_path):
    content = lines(ASR, "", "{broken", ASR, "[1]", "  ", ASR).encode()
    content = content.replace(b"{broken", b'{"text": "\xff"}', 1) + b"{broken" + b"\n" + b"[" * 9999
    found = located(write(tmp_path / "t.jsonl", content))
    assert [(item.line, item.example is not None) for item in found] == [
        (1, True),
        (3, False),
        (4, True),
        (5, False),
        (7, True),
        (8, False),
        (9, False),
    ]
    assert "t.jsonl line 3: not valid UTF-8" in found[1].error
    assert "not a JSON object: found a list" in found[3].error
    assert "t.jsonl line 8: not valid JSON" in found[5].error
    assert "not readable as JSON" in found[6].error or "not valid JSON" in found[6].error


def test_places_of_lines_are_byte_offsets_also_behind_blank_foreign_and_unended_lines(tmp_path):
    content = "\ufeff" + lines({**ASR, "text": "grüße 你好 🎧"}, "", ASR) + "\r\n" + json.dumps(TTS)
    file = write(tmp_path / "t.jsonl", content)
    raw = file.read_bytes()
    found = located(file)
    assert [item.line for item in found] == [1, 3, 5]
    ming = sources.get("ming_jsonl")
    for item in found:
        again = ming.parse(raw[item.offset : item.offset + item.size], file, item.line)
        assert again == item.example


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_chunks_of_lines_join_to_the_file_at_any_size(tmp_path, block):
    rng = random.Random(block)
    content = b"".join(b"x" * rng.randrange(30) + b"\n" for _ in range(200)) + b"last"
    file = write(tmp_path / "t.jsonl", content)
    survey = json_lines.survey(file, block)
    assert survey.digest == hashlib.sha256(content).hexdigest()
    assert survey.size == len(content)
    chunked = [item for chunk in survey.chunks for item in json_lines.items(file, chunk)]
    assert chunked == list(json_lines.items(file))
    expected = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    assert [(item.line, item.raw.strip()) for item in chunked] == expected


def test_a_line_without_end_does_not_fill_the_memory(tmp_path):
    file = write(tmp_path / "t.jsonl", b"a\n" + b"x" * 3000 + b"\nb\n" + b"y" * 1000)
    found = list(json_lines.items(file, max_bytes=1000))
    assert [(item.line, item.offset, item.raw) for item in found] == [
        (1, 0, b"a\n"),
        (2, 2, None),
        (3, 3003, b"b\n"),
        (4, 3005, None),
    ]


# --- MoST JSON


SHAPES = {
    "list": lambda items: items,
    "data": lambda items: {"version": [{"data": 1}, "]"], "data": items, "more": {"a": []}},
    "one": lambda items: items[0],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_all_three_shapes_are_recognised_and_read(tmp_path, shape, indent, bom):
    content = SHAPES[shape]([MOST])
    file = write(tmp_path / "a.json", bom + json.dumps(content, indent=indent) + "\n")
    assert examples(file) == [
        Example("x", "asr", (Units((7, 90, 481)),), ("HI",), "Transcribe.", text="HI")
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("form", ["auto", "most_json"])
def test_lines_of_items_are_read_and_a_broken_one_costs_itself(tmp_path, name, form):
    alpaca = {"instruction": "Say hi.", "output": "hi"}
    content = "\ufeff\n" + lines(MOST, "", alpaca, "BROKEN", {**alpaca, "input": "x"}, MOST)
    content += json.dumps(alpaca)
    file = write(tmp_path / name, content.replace("BROKEN", "{broken"))
    found = located(file, format=form)
    assert [(item.line, item.example is not None) for item in found] == [
        (2, True),
        (4, True),
        (5, False),
        (6, True),
        (7, True),
        (8, True),
    ]
    texts = [item.example.input for item in found if item.example]
    assert texts == [(Units((7, 90, 481)),), (), ("x",), (Units((7, 90, 481)),), ()]
    raw = file.read_bytes()
    assert all(json.loads(raw[i.offset : i.offset + i.size]) for i in found if i.example)
    first_broken = write(tmp_path / "b.jsonl", "{broken\n" + lines(MOST, MOST))
    assert [item.example is None for item in located(first_broken)] == [True, False, False]


def test_the_task_type_is_read_in_any_case_or_from_the_entry(tmp_path):
    file = write(tmp_path / "t.jsonl", lines({**ASR, "task_type": " ASR"}))
    assert [example.task for example in examples(file)] == ["asr"]
    bare = {key: value for key, value in ASR.items() if key != "task_type"}
    file = write(tmp_path / "b.jsonl", lines(bare))
    assert [example.task for example in examples(file, task="ASR")] == ["asr"]
    assert [example.input for example in examples(file, task="tts")] == [("hello",)]
    assert "set the entry's task to one of these" in reason(file)
    assert "set the entry's task to one of these" in reason(file, task="caption")


def test_units_text_and_mixtures_become_parts_in_order(tmp_path):
    item = {"instruction": "Go.", "input": "a [Hu1][Hu2] b [Hu3]", "output": " [Hu4]\n[Hu5] "}
    file = write(tmp_path / "a.json", json.dumps([item]))
    assert examples(file) == [
        Example("a:1", "tts", ("a ", Units((1, 2)), " b ", Units((3,))), (Units((4, 5)),), "Go.")
    ]


@pytest.mark.parametrize(
    ("fields", "override", "task", "text"),
    [
        ({"input": SPEECH, "output": "hi"}, None, "asr", "hi"),
        ({"input": "hi", "output": SPEECH}, None, "tts", "hi"),
        ({"input": "hi", "output": "ho"}, None, "text", None),
        ({"input": SPEECH, "output": SPEECH}, None, "tts", None),
        ({"input": SPEECH, "output": "hi", "metadata": {"task": "ASR"}}, None, "asr", "hi"),
        ({"input": SPEECH, "output": "hi", "metadata": {"task": "st"}}, None, "st", None),
        ({"input": SPEECH, "output": "hi", "metadata": {"task": "st"}}, "asr", "asr", "hi"),
        ({"input": SPEECH, "output": "hi", "metadata": None}, None, "asr", "hi"),
    ],
)
def test_the_task_is_the_sources_then_the_metadatas_then_that_of_the_parts(
    tmp_path, fields, override, task, text
):
    (example,) = examples(write(tmp_path / "a.json", json.dumps([fields])), task=override)
    assert (example.task, example.text) == (task, text)


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({"task": "asr"}, "asr"),
        ({"task_type": "ASR "}, "asr"),
        ({"task": "st", "metadata": {"task": "ST"}}, "st"),
        ({"task": "asr", "task_type": "asr"}, "asr"),
        ({"task": None, "task_type": "", "metadata": {}}, "text"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_the_items_own_task_is_read(tmp_path, fields, task, name):
    item = {"instruction": "say", "input": "x", "output": "y", **fields}
    content = json.dumps([item, item]) if name == "a.json" else lines(item, item)
    file = write(tmp_path / name, content)
    assert [example.task for example in examples(file)] == [task] * 2
    assert [example.task for example in examples(file, task="qa")] == ["qa"] * 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"task": "asr", "task_type": "tts"}, "field 'task' says 'asr', 'task_type' says 'tts'"),
        ({"task": "a", "metadata": {"task": "b"}}, "'metadata.task' says 'b', 'task' says 'a'"),
        ({"task_type": 3}, "field 'task_type' is not a text"),
    ],
)
def test_tasks_that_contradict_each_other_refuse_the_item(tmp_path, fields, says):
    item = {"instruction": "say", "input": "x", "output": "y", **fields}
    assert says in reason(write(tmp_path / "a.json", json.dumps([item])))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input": None}, "'input' is null"),
        ({"output": ["x"]}, "'output' is a list"),
        ({"output": ""}, "'output' is empty"),
        ({"input": "[Hu7][Hu"}, "'input' holds a malformed unit near '[Hu'"),
        ({"input": "[Hu-1]"}, "malformed unit"),
        ({"input": "[Hu12345678901]"}, "malformed unit"),
        ({"instruction": 5}, "'instruction' is a number"),
        ({"instruction": "", "input": ""}, "both empty"),
        ({"metadata": "asr"}, "'metadata' is a text"),
        ({"metadata": {"task": 1}}, "'metadata.task'"),
    ],
)
def test_an_unusable_item_is_named_and_the_others_are_read(tmp_path, change, says):
    file = write(tmp_path / "a.json", json.dumps([MOST, {**MOST, **change}, MOST]))
    found = located(file)
    assert [item.example is None for item in found] == [False, True, False]
    assert found[1].error.startswith("a.json item 2: ")
    assert says in found[1].error


def test_a_fault_inside_an_item_costs_that_item_only(tmp_path):
    good = json.dumps(MOST)
    file = write(
        tmp_path / "a.json", f'[{good}, {{"a": nul, "b": [1]}}, 3, "s, ]", [{{}}], {good}]'
    )
    found = located(file, format="most_json")
    assert [(item.line, item.example is not None) for item in found] == [
        (1, True),
        (2, False),
        (3, False),
        (4, False),
        (5, False),
        (6, True),
    ]


def random_text(rng):
    pool = ['"', "\\", "{", "}", "[", "]", ",", ":", "é", "你", "🎧", "\n", "\t", "a", " ", "\x7f"]
    return "".join(rng.choice(pool) for _ in range(rng.randrange(25)))


@pytest.mark.parametrize("seed", range(20))
def test_scanning_agrees_with_a_json_parser_at_every_buffer_and_chunk_size(
    tmp_path, monkeypatch, seed
):
    rng = random.Random(seed)
    items = [
        {random_text(rng): rng.choice([random_text(rng), {"k": [random_text(rng)]}, 1.5, None])}
        for _ in range(30)
    ]
    shape = SHAPES[rng.choice(["list", "data"])]
    content = json.dumps(
        shape(items), ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])
    )
    file = write(tmp_path / "a.json", content)
    monkeypatch.setattr(json_items, "BLOCK", rng.choice([1, 2, 3, 17, 100]))
    found = list(json_items.items(file))
    assert [json.loads(item.raw) for item in found] == items
    raw = file.read_bytes()
    assert all(raw[i.offset : i.offset + i.size] == i.raw for i in found)
    survey = json_items.survey(file, rng.choice([1, 50, 400]), rng.choice([1, 4, 1000]))
    assert survey.digest == hashlib.sha256(raw).hexdigest()
    assert survey.size == len(raw)
    assert [i for chunk in survey.chunks for i in json_items.items(file, chunk)] == found


def test_one_object_larger_than_the_buffer_is_one_item(tmp_path, monkeypatch):
    monkeypatch.setattr(json_items, "BLOCK", 64)
    item = {**MOST, "input": "[Hu1]" * 5000}
    file = write(tmp_path / "a.json", json.dumps(item))
    (chunk,) = json_items.survey(file).chunks
    assert chunk == Chunk(0, file.stat().st_size, 1)
    (found,) = json_items.items(file, chunk)
    assert json.loads(found.raw) == item


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps([MOST, MOST])[:-30], "item 2 at byte .* does not close before the file ends"),
        (json.dumps([MOST, MOST])[:-1], "before its list is closed"),
        (json.dumps([MOST]) + " {}", "follows the end"),
        (json.dumps(MOST, indent=1) + "\n" + json.dumps(MOST, indent=1), "follows the end"),
        ('[{"input": 1}, }', "begins with '}'"),
        ('{"input" 1}', "no ':'"),
        ('[{"input": [1}, {}]', "item 1 at byte 1 has '}' in the wrong place"),
    ],
)
def test_a_file_whose_brackets_do_not_close_is_refused_with_the_place(tmp_path, content, says):
    file = write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=f"a.json: not valid JSON: .*{says}"):
        sources.get("most_json").survey(file)


def test_a_folder_is_read_by_the_names_of_its_files(tmp_path):
    for name in ("b_train.json", "a-train-2.json", "x_dev.json", "valid.json", "test.json"):
        write(tmp_path / name, json.dumps([{**MOST, "id": name}]))
    write(tmp_path / "._b_train.json", b"\0\5")
    write(tmp_path / "train.txt", "x")

    def names(split):
        return [file.name for file in sources.resolve(Source(path=str(tmp_path)), split).files]

    assert names("train") == ["a-train-2.json", "b_train.json"]
    assert names("eval") == ["valid.json", "x_dev.json"]


def test_a_folder_without_a_match_says_what_was_looked_for_and_what_is_there(tmp_path):
    write(tmp_path / "x_train.json", json.dumps([MOST]))
    with pytest.raises(UserError, match=r"\*dev\*.json or \*valid\*.json; found.*x_train.json"):
        sources.resolve(Source(path=str(tmp_path)), "eval")
    write(tmp_path / "train_validated.json", json.dumps([MOST]))
    with pytest.raises(UserError, match=r"train_validated\.json matches the names of both"):
        sources.resolve(Source(path=str(tmp_path)), "train")


# --- resolving


def test_the_format_is_told_by_content_whatever_the_name(tmp_path):
    ming = write(tmp_path / "a.json", "\n{broken\n" + lines(ASR))
    most = write(tmp_path / "b.jsonl", json.dumps([MOST]))
    assert sources.resolve(Source(path=str(ming)), "train").format == "ming_jsonl"
    assert sources.resolve(Source(path=str(most)), "train").format == "most_json"


@pytest.mark.parametrize("content", [b"RIFF\0\0", b"hello\n", b'{"a": 1}\n', b"\xff\xfe{\0"])
def test_a_file_in_no_format_is_refused_with_the_formats_and_what_was_found(tmp_path, content):
    file = write(tmp_path / "a.bin", content)
    with pytest.raises(UserError) as caught:
        sources.resolve_all([Source(path=str(file))], "eval")
    text = str(caught.value)
    assert text.startswith("data.eval[0]: ")
    assert "ming_jsonl" in text
    assert "most_json" in text
    assert repr(content[:60]) in text


def test_paths_that_hold_nothing_readable_are_refused_by_key(tmp_path):
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "a.jsonl", lines(ASR))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo.jsonl")
    for name, form, says in (
        ("nowhere.jsonl", "auto", "nowhere.jsonl does not exist; .* holds a.jsonl, empty.jsonl"),
        ("a.jsonl/x", "auto", "does not exist"),
        ("empty.jsonl", "auto", "is an empty file"),
        ("fifo.jsonl", "auto", "neither a file nor a folder"),
        ("folder", "auto", "a folder with nothing in it"),
        (".", "ming_jsonl", "reads files: .*found: a.jsonl, empty.jsonl"),
        (
            "a.jsonl",
            "most",
            "no source format 'most'; near is most_json; there are: auto, aishell, ",
        ),
    ):
        good = Source(path=str(tmp_path / "a.jsonl"))
        bad = Source(path=str(tmp_path / name), format=form)
        with pytest.raises(UserError, match=rf"data\.train\[1\].*{says}"):
            sources.resolve_all([good, bad], "train")


def test_names_of_sources_differ(tmp_path):
    paths = [write(tmp_path / name, lines(ASR)) for name in ("a/test.jsonl", "b/test.jsonl")]
    entries = [Source(path=str(path)) for path in (*paths, paths[0])]
    found = sources.resolve_all(entries, "eval")
    assert [source.name for source in found] == ["a_test", "b_test", "a_test_2"]
    named = [Source(path=str(path), name="same") for path in paths]
    with pytest.raises(UserError, match=r"data.eval\[1\].name: 'same' is the name of another"):
        sources.resolve_all(named, "eval")


def test_parsing_raises_only_bad_example(tmp_path):
    """Whatever bytes an item has."""
    rng = random.Random(0)
    values = [None, 1, -1.5, True, "", "x", "[Hu1]", [], {}, {"task": []}, "\ud800", 10**30]
    keys = ["task_type", "wav_path", "text", "lang", "id", "input", "output", "instruction"]
    for _ in range(3000):
        record = {key: rng.choice(values) for key in rng.sample([*keys, "metadata"], 7)}
        record["task_type"] = rng.choice(["asr", "tts", *values])
        raw = json.dumps(record).encode()
        if rng.random() < 0.2:
            raw = raw[: rng.randrange(len(raw))] + bytes([rng.randrange(256)])
        for form in sources.formats().values():
            try:
                assert form.parse(raw, tmp_path / "f", 1).id
            except BadExample as error:
                assert str(error)
