"""Fields that are not read: harmless, or refused by name because training would go wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from raysft.config.schema import Data, Model, Source
from raysft.data import sources
from raysft.data.encode import make_encoder
from raysft.data.index.build import build_index
from raysft.errors import UserError

ASR = {"task_type": "asr", "wav_path": "clips/a.wav", "text": "hello"}
MOST = {"instruction": "Transcribe.", "input": "[Hu7][Hu90]", "output": "HI"}


def reason(tmp_path: Path, record: dict[str, Any]) -> str | None:
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps(record) + "\n")
    source = sources.resolve(Source(path=str(file)), "train")
    (found,) = sources.scan(source, file)
    return found.error


PARTS = [
    {"offset": 0.4},
    {"offset": 0.4, "duration": 0.6},
    {"offset": "0.4"},
    {"start": 1.5, "end": 2},
    {"start": "00:01:02", "end": "00:01:04"},
    {"end": 2.0},
    {"begin_time": 3},
    {"start_ms": 120, "end_ms": 900},
    {"segment": [0, 1.2]},
    {"segments": [{"start": 0}]},
    {"timestamps": [[0, 1]]},
    {"frame_offset": 16000},
    {"Start": 3},
    {"channel": 0},
    {"channel": 1},
    {"channel": [0]},
    {"channel": "left"},
    {"channels": [0]},
    {"channel_selector": "1"},
    {"startTime": 3.2, "endTime": 5.0},
    {"start-time": 2},
    {"startOffset": 1},
    {"audioStart": 2},
    {"begin_ms": 300},
    {"offset_seconds": 3},
    {"offset_sec": 3},
    {"begin_sec": 3},
    {"clip_start": 1.5, "clip_end": 4},
    {"utt_start": 1, "utt_end": 2},
    {"audio_start_sec": 3},
    {"start_timestamp": 3, "end_timestamp": 5},
    {"t_start": 1, "t_end": 2},
    {"stime": 1, "etime": 2},
    {"trim_start": 2},
    {"offset": "3.5s"},
    {"start": "3.5 s"},
    {"start": "3,5"},
    {"start": ".5"},
    {"start": "0:00", "end": "0:05"},
    {"region": {"start": 1, "end": 2}},
    {"clip": {"startTime": 1}},
    {"extra": {"cut": {"begin": "1.5"}}},
    {"supervisions": [{"start": 1, "duration": 2}]},
    {"supervisions": [{"start": 0, "duration": 2}]},
    {"extra": {"段": {"start": 1}, "注": {"x": 1}}},
    {"interval": [1, 2]},
    {"time": [1, 2]},
    {"audio_spans": [[0, 1.5]]},
    {"audio_channel": 1},
    {"speakerChannel": 0},
    {"chan": 1},
    {"channel": "ch1"},
    {"channel": "A"},
]
AUDIO = [
    {"audio": "b.wav"},
    {"audio": "clips/0001"},
    {"audio": {"bytes": None, "path": "b.wav"}},
    {"audio": [0.1, 0.2]},
    {"audios": ["b.wav"]},
    {"audio_path": "b"},
    {"audio_filepath": "b.flac"},
    {"prompt_wav_path": "p.wav"},
    {"wav": "data:audio/wav;base64,UklGRg=="},
    {"noise": "street.ogg"},
    {"extra": {"reference": ["x.mp3"]}},
    {"images": ["a.png"]},
    {"video": "a.mp4"},
    {"audioUrl": "x"},
    {"audioPath": "b"},
    {"attachments": [{"type": "audio", "url": "http://x/a"}]},
    {"attachments": [{"type": "input_audio", "input_audio": {"data": "UklGR"}}]},
    {"media": {"mimeType": "audio/wav", "content": "UklGR"}},
    {"attachments": [{"type": "image_url", "url": "http://x/a"}]},
]
SAID = [
    {"messages": [{"role": "user", "content": "x"}]},
    {"conversations": [{"from": "human", "value": "x"}]},
    {"system": "You are kind."},
    {"history": [["a", "b"]]},
    {"query": "x", "response": "y"},
    {"target": "z"},
    {"completion": "z"},
    {"reasoning_content": "z"},
    {"thinking": "z"},
]
HARMLESS: list[dict[str, Any]] = [
    {"speaker": "s1", "voice": "v", "gender": "f", "age": 31, "accent": "us"},
    {"source": "LibriSpeech", "dataset": "x", "split": "train", "sampling_rate": 16000},
    {"audio_id": "k1", "recording_id": "r1", "speech_rate": "fast", "audio_duration": 2.5},
    {"dnsmos": 3.2, "snr": 12, "wer": 0.1, "num_samples": 3, "n_frames": 100},
    {"segment": "Benchmark", "segment_id": 3, "channel": "telephone", "channels": 2},
    {"offset": 0, "start": 0.0, "end": None, "channel": None, "duration": 3.2},
    {"end_of_speech": 1.2, "original_start": 3, "start_token": 7, "word_start": [0, 1]},
    {"start": "", "start_time": "2024-03-01T10:00:00", "begin": "0.0", "onset": "slow"},
    {"words": [{"start": 1, "end": 2, "word": "hi"}], "vad": [[0, 1]], "pitch_range": [50, 300]},
    {"region": "north", "interval": 3, "window": [], "info": {"start": 0, "speaker": 2}},
    {"channel": "mono", "num_channels": 2, "ch": "stereo", "offset": False, "segment_ids": [1, 2]},
    {"audios": [], "audio": None, "system": "", "history": [], "messages": []},
    {"thinking": False, "annotation": {"type": "manual"}, "attachments": [{"type": "text"}]},
    {"metadata": {"offset": 3, "file": "b.wav", "messages": [1]}},
    {"text_normalized": "HELLO", "phonemes": "h", "tags": ["a", "b"], "verified": True},
]


@pytest.mark.parametrize("fields", [*PARTS, *AUDIO, *SAID], ids=json.dumps)
@pytest.mark.parametrize("record", [ASR, MOST], ids=["ming", "most"])
def test_a_field_that_would_change_what_is_learnt_refuses_the_record_by_name(
    tmp_path: Path, record: dict[str, Any], fields: dict[str, Any]
) -> None:
    found = reason(tmp_path, {**record, **fields})
    assert found is not None
    assert found.startswith("t.jsonl ")
    assert any(f"field {name!r} " in found for name in fields)
    assert "put it below 'metadata'" in found


@pytest.mark.parametrize("fields", HARMLESS, ids=json.dumps)
@pytest.mark.parametrize("record", [ASR, MOST], ids=["ming", "most"])
def test_metadata_and_empty_fields_stay_unread(
    tmp_path: Path, record: dict[str, Any], fields: dict[str, Any]
) -> None:
    assert reason(tmp_path, {**record, **fields}) is None


def test_a_field_that_names_the_same_clip_is_harmless(tmp_path: Path) -> None:
    assert reason(tmp_path, {**ASR, "audio": "a.wav", "path": "/other/root/clips/a.wav"}) is None
    assert "field 'audio'" in (reason(tmp_path, {**ASR, "audio": "clips/b.wav"}) or "")


def test_only_items_are_given_an_instruction(tmp_path: Path) -> None:
    assert "field 'instruction'" in (reason(tmp_path, {**ASR, "instruction": "Translate."}) or "")
    assert "field 'prompt'" in (reason(tmp_path, {**MOST, "prompt": "Translate."}) or "")


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
@pytest.mark.parametrize(
    "place",
    ["<audio>", "<speech>", "<sound>", "<audio_0>", "<image1>", "<|AUDIO|>", "<|audio_bos|>"],
)
def test_a_place_for_audio_that_nothing_fills_refuses_the_item(
    tmp_path: Path, field: str, place: str
) -> None:
    item = {"instruction": "a", "input": "b", "output": "c", field: f"{place}x"}
    assert f"field {field!r} holds {place}" in (reason(tmp_path, item) or "")


def test_what_only_looks_like_a_place_for_audio_is_text(tmp_path: Path) -> None:
    text = "<Image src={x}/> <Image> <speak> a <b> <audiobook> <|end|> sound <- audio"
    assert reason(tmp_path, {"instruction": text, "input": text, "output": text}) is None


@pytest.mark.parametrize("depth", [50, 300, 700])
def test_a_deeply_nested_field_is_looked_through_or_refused(tmp_path: Path, depth: int) -> None:
    file = tmp_path / "t.jsonl"
    inside = "[" * depth + '{"start": 3}' + "]" * depth
    file.write_text('{"task_type": "asr", "wav_path": "a.wav", "text": "x", "n": ' + inside + "}\n")
    source = sources.resolve(Source(path=str(file), format="ming_jsonl"), "train")
    (found,) = sources.scan(source, file)
    assert found.error is not None
    assert "part of a clip" in found.error or (depth > 300 and "deep" in found.error)


def test_a_field_given_twice_refuses_the_record(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"task_type": "asr", "wav_path": "a.wav", "text": "one", "text": "two"}\n')
    source = sources.resolve(Source(path=str(file)), "train")
    (found,) = sources.scan(source, file)
    assert found.error == "t.jsonl line 1: field 'text' is given twice"


# --- duration: a length of the clip, or of the part that is meant


def index_of(tmp_path: Path, *durations: object, clip_seconds: float = 1.0) -> Any:
    soundfile.write(tmp_path / "a.wav", np.full(int(16000 * clip_seconds), 0.1), 16000)
    file = tmp_path / "t.jsonl"
    lines = [
        {**ASR, "wav_path": "a.wav", "id": str(n), "duration": d} for n, d in enumerate(durations)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "model_type": "qwen2_audio",
        "audio_config": {"num_mel_bins": 80, "max_source_positions": 1500},
        "text_config": {"model_type": "qwen2"},
    }
    encoder = make_encoder(Model(config=settings, tokenizer="bytes"), Data(), tmp_path)
    return build_index([Source(path=str(file))], "train", encoder, tmp_path / "index")


def test_a_duration_of_the_whole_clip_is_harmless_however_it_is_rounded(tmp_path: Path) -> None:
    lengths = (1.0, 1.04, 1, 0.99, 2.5, "1.0", None, 0, -1, True, "?", "1e400")
    index = index_of(tmp_path, *lengths)
    assert len(index) == len(lengths)
    index = index_of(tmp_path, 3, 3.0, 3.8, 3.84, 3.9, clip_seconds=3.85)
    assert not index.rejected


def test_a_clip_longer_than_its_duration_is_refused_for_a_part_is_meant(tmp_path: Path) -> None:
    index = index_of(tmp_path, 1.0, 0.4, 0.75, "0.4", 1e-3)
    assert index.seconds.tolist() == [1.0]
    assert len(index.rejected) == 4
    assert "field 'duration' says 0.4 s, but the clip has 1.00 s" in index.rejected[0].reason
    with pytest.raises(UserError, match=r"none of the 1 examples .* field 'duration' says 2 s"):
        index_of(tmp_path, 2, clip_seconds=30)
