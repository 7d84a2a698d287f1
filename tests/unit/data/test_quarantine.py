"""Reasons have kinds, and many of them one short line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import raysft
from raysft.data.example import Quarantined
from raysft.data.quarantine import KINDS, OTHER, Known, kind, kind_of, kind_of_line, summary

REASONS = {
    "missing": ["no such file"],
    "folder": ["a folder, not a file"],
    "not a file": ["a pipe, socket or device, not a file"],
    "unreadable": ["cannot be read (permission denied)"],
    "stalled": ["no answer within 60 s (data.read_timeout_s): see that its storage answers"],
    "empty": ["empty file"],
    "not audio": [
        "not audio that can be read (Format not recognised.)",
        "raw samples have no header: convert the clip to wav or flac",
        "its header gives no length: write the clip anew",
    ],
    "truncated": [
        "cut off: 10 of 20 samples are there",
        "damaged or cut off: decoding failed (libsndfile error 158)",
    ],
    "NaN or infinite": ["has NaN or infinite samples"],
    "silent": ["silent: all samples are 0, below data.silence_db=-90"],
    "too short": ["too short: 1 samples at 16000 Hz, less than data.min_seconds=0.025"],
    "too long": ["too long: 61.00 s, more than data.max_seconds=60"],
    "longer than indexed": ["longer than indexed: 3600.00 s, expected at most 5 s: was the file"],
    "no such part": [
        "from 2 to 1 s is no part of a clip",
        "has 3.00 s, of which 4 s to its end is no part",
        "has no channel 2: it has 2, counted from 0",
    ],
    "shorter than indexed": [
        "shorter than indexed: 1.00 s, expected 2.00 s: was the file replaced?"
    ],
}
WITHOUT_A_PATH = {
    "too short": [
        "320 samples at 16000 Hz: shorter than one frame (0.025 s)",
        "its clip of 0.030 s is too short: 1 audio token",
        "its clip of 0.030 s is shorter than one speech unit",
    ],
    "too long": ["its clip is 31.00 s, the model reads at most 30.00 s"],
    "beyond learned positions": ["takes 90 positions, and the model has learned 64: shorten it"],
    "over budget": [
        "takes 9000 positions, more than data.tokens_per_batch=4096",
        "has 60 s for the encoder, more than data.audio_per_batch=45",
    ],
    "longer than indexed": [
        "takes 90 positions, but 70 by the lengths its clips' headers give",
        "takes 90 positions, 70 were planned from its header; it no longer fits its micro-batch",
    ],
    "malformed record": [
        "not valid JSON: Expecting value at character 3",
        "not valid UTF-8: invalid start byte at byte 4",
        "not a JSON object: found a list",
        "not readable as JSON: too deep",
        "holds half a surrogate pair (\\ud800 to \\udfff), not text",
        "field 'text' is empty",
        "fields 'instruction' and 'input' are both empty",
        "task_type is 'edit'; supported: asr, tts",
    ],
    "bad text": ["its text contains <|AUDIO|>, a token that steers the model"],
    "unknown unit": ["unit 100, but there are 100 units"],
    "unknown token": ["has the id 5000, and the tokenizer has 259 tokens: are these another"],
    "no kind": ["token \u00e9 (id 195) is in no group of model.moe.modality"],
    "unknown language": [
        "its language 'xx' is unknown to the tokenizer, which has en, de",
        "its language is 'de', and the model knows English only",
        "it names no language: give it a lang, or set data.language for all that name none",
    ],
    "not one clip": [
        "has no clip, and seq2seq reads one",
        "has 2 clips, and seq2seq reads one",
    ],
    "no speaker embedding": [
        "has no speaker embedding, and the model reads one of 192 values: make them",
        "its speaker embedding has 256 values, the model reads 192",
    ],
    "one speaker twice": [
        "is a dialog in which speaker b has two turns in a row (2 and 3)",
    ],
    "no pair": [
        "has no rejected answer, and train.objective: dpo learns from pairs",
        "its chosen and its rejected answer are the same",
        "its chosen and its rejected answer have other clips, which this model reads",
    ],
    "tokens of another length": [
        "its speech tokens (20 rows) are 0.80 s and its clip 0.36 s: they are not of this clip",
    ],
}


@pytest.mark.parametrize("of", [*REASONS])
@pytest.mark.parametrize(
    "place", ["/data/a.wav: ", "train.jsonl line 7: /data/a.wav: ", "/data: no such file/a.wav: "]
)
def test_the_reason_of_a_clip_has_its_kind_wherever_the_clip_lies(of: str, place: str) -> None:
    assert {kind(place + reason) for reason in REASONS[of]} == {of}


@pytest.mark.parametrize("of", [*WITHOUT_A_PATH])
@pytest.mark.parametrize("place", ["", "train.jsonl line 7: "])
def test_the_reason_of_an_example_has_its_kind(of: str, place: str) -> None:
    assert {kind(place + reason) for reason in WITHOUT_A_PATH[of]} == {of}


def test_every_kind_has_a_reason_here_and_others_are_counted_too() -> None:
    assert {*REASONS, *WITHOUT_A_PATH, OTHER} == set(KINDS)
    assert kind("/data/empty file.wav: something new") == OTHER
    assert kind("") == OTHER


def test_a_summary_counts_by_kind_the_most_frequent_first() -> None:
    reasons = ["/a.wav: silent: all samples are 0"] * 2
    reasons += [f"x.jsonl line {line}: /{line}.wav: no such file" for line in range(412)]
    reasons += [f"/{number}.wav: not audio that can be read (?)" for number in range(30)]
    reasons += ["something new", "/a.wav: cut off: 1 of 2 samples are there"]
    expected = "412 missing, 30 not audio, 2 silent, 1 truncated, 1 other"
    kinds = [*map(kind, reasons)]
    assert summary(kinds) == expected
    assert summary(reversed(kinds)) == expected
    assert summary([]) == ""


def raised() -> Iterator[tuple[str, str, str]]:
    """Where raysft raises a BadExample of a kind, the kind, and its text, with 'x' for values."""
    for path in Path(raysft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "BadExample":
                continue
            if len(node.args) == 2 and isinstance(node.args[1], ast.Constant):
                said = node.args[0]
                parts = said.values if isinstance(said, ast.JoinedStr) else [said]
                text = [part.value if isinstance(part, ast.Constant) else "'x'" for part in parts]
                yield f"{path.name}:{node.lineno}", node.args[1].value, "".join(text)


def test_what_is_raised_has_the_kind_that_its_text_tells() -> None:
    """Lines of before kinds were kept, and those of now, are counted as one."""
    found = list(raised())
    assert len(found) > 50
    for where, given, text in found:
        assert given in KINDS, where
        assert kind(text) in (given, OTHER), f"{where}: {text}"


def test_a_kind_that_was_kept_counts_and_else_the_text_tells() -> None:
    assert kind_of(Quarantined("a", "s", "/a.wav", "/a.wav: silent", "missing")) == "missing"
    assert kind_of(Quarantined("a", "s", "/a.wav", "/a.wav: silent")) == "silent"
    assert kind_of(Quarantined("a", "s", "/a.wav", "/a.wav: silent", "of my own")) == "silent"
    assert kind_of_line({"reason": "/a.wav: silent", "kind": "missing"}) == "missing"
    assert kind_of_line({"reason": "/a.wav: silent"}) == "silent"


def test_what_is_known_is_counted_once_and_by_name() -> None:
    known = Known()
    line = {"source": "a", "path": "/1", "id": "x", "reason": "silent"}
    assert known.add(line)
    assert not known.add({**line, "reason": "no such file", "step": 7})
    assert known.add({**line, "path": "/moved"})  # recorded again where the data was moved
    assert known.add({**line, "source": "b"})
    assert known.names == 1
    assert known.add({"source": "a", "path": "", "id": "/1x", "reason": "empty file"})
    assert known.names == 2
    assert summary(known.kinds.elements()) == "3 silent, 1 empty"
