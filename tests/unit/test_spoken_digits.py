"""The example corpus: what its manifests, clips and tokenizer promise."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer

from raysft.config import load_config
from raysft.data.encode import make_encoder
from raysft.data.example import Units
from raysft.data.sources.most_json import FORMAT

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "spoken_digits"
SPLITS = ("train", "dev", "test", "test_unseen")


def imported(name: str) -> ModuleType:
    file = FOLDER / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"spoken_digits_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return imported("generate")


def records(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


def texts(split: str) -> set[str]:
    return {record["text"] for record in records(split)}


def voices(split: str) -> set[str]:
    return {record["voice"] for record in records(split)}


def test_manifests_are_what_the_generator_plans(generate: ModuleType) -> None:
    splits = generate.plan()
    assert set(splits) == set(SPLITS)
    for split, clips in splits.items():
        assert (FOLDER / f"{split}.jsonl").read_text() == "".join(generate.manifest(clips))


def test_another_seed_plans_another_corpus(generate: ModuleType) -> None:
    assert generate.plan(1) == generate.plan(1)
    assert generate.plan(1) != generate.plan(2)


def test_every_file_is_named_by_one_record_and_ids_are_unique() -> None:
    every = [record for split in SPLITS for record in records(split)]
    named = [record["wav_path"] for record in every]
    present = [file.relative_to(FOLDER) for file in FOLDER.glob("audio/*/*")]
    assert sorted(named) == sorted(file.as_posix() for file in present)
    assert len({record["id"] for record in every}) == len(every)


@pytest.mark.parametrize("split", SPLITS)
def test_every_clip_decodes_to_audible_speech_of_at_most_two_seconds(split: str) -> None:
    for record in records(split):
        samples, rate = soundfile.read(FOLDER / record["wav_path"], dtype="float32")
        assert 0.2 < len(samples) / rate <= 2.0, record
        assert 0.05 < np.abs(samples).max() < 1.5, record


def test_small_splits_mix_containers_rates_and_channels() -> None:
    for split in ("dev", "test", "test_unseen"):
        infos = [soundfile.info(FOLDER / record["wav_path"]) for record in records(split)]
        assert {info.format for info in infos} >= {"WAV", "FLAC", "OGG", "MP3"}
        assert {info.samplerate for info in infos} >= {8000, 16000, 22050, 44100}
        assert {info.channels for info in infos} == {1, 2}


def test_held_out_strings_are_not_in_train() -> None:
    assert not texts("train") & (texts("dev") | texts("test") | texts("test_unseen"))
    assert not texts("dev") & texts("test")
    assert len(texts("test")) == len(records("test")) == 100


def test_unseen_voices_are_heard_nowhere_else() -> None:
    known = voices("train") | voices("dev") | voices("test")
    assert len(voices("train")) == 8
    assert len(voices("test_unseen")) == 5
    assert not voices("test_unseen") & known
    assert voices("dev") == voices("test") == voices("train")


def test_the_folder_takes_three_to_five_megabytes() -> None:
    generated = {"units", "__pycache__"}
    files = [
        file
        for file in FOLDER.rglob("*")
        if file.is_file() and not generated & set(file.relative_to(FOLDER).parts)
    ]
    assert 3e6 <= sum(file.stat().st_size for file in files) <= 5e6


def test_tokenizer_on_disk_is_the_one_the_generator_builds(generate: ModuleType) -> None:
    built = generate.build_tokenizer()
    loaded = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    assert loaded.get_vocab() == built.get_vocab()
    assert loaded.backend_tokenizer.to_str() == built.backend_tokenizer.to_str()


def test_the_tokenizer_of_whisper_has_a_token_for_each_digit(generate: ModuleType) -> None:
    built = generate.build_whisper_tokenizer()
    loaded = AutoTokenizer.from_pretrained(FOLDER / "whisper_tokenizer")
    assert type(loaded) is type(built)
    assert loaded.backend_tokenizer.to_str() == built.backend_tokenizer.to_str()
    for text in sorted(texts("train")):
        ids = loaded.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.split())
        assert loaded.decode(ids) == text


def test_tokenizer_gives_transcripts_back_and_knows_every_word_of_the_corpus() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    for text in texts("train") | texts("test"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_tokenizer_takes_newlines_special_tokens_and_unknown_words() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    prompt = "transcribe\n<|audio_bos|><|AUDIO|><|AUDIO|><|audio_eos|>\none two"
    tokens = tokenizer.tokenize(prompt, add_special_tokens=False)
    audio = ["<|audio_bos|>", "<|AUDIO|>", "<|AUDIO|>", "<|audio_eos|>"]
    assert tokens == ["transcribe", "\n", *audio, "\n", "one", "two"]
    assert tokenizer.encode("", add_special_tokens=False) == []
    unknown = tokenizer.encode("one elephant", add_special_tokens=False)
    assert unknown[1] == tokenizer.unk_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_shrinking_an_opus_file_leaves_its_audio_as_it_was(generate: ModuleType) -> None:
    samples = 0.1 * np.random.default_rng(0).normal(size=20000)
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="OGG", subtype="OPUS", compression_level=0.985)
    shrunk = generate.without_padding(file.getvalue())
    assert len(shrunk) < len(file.getvalue()) - 500
    before, _ = soundfile.read(io.BytesIO(file.getvalue()))
    after, _ = soundfile.read(io.BytesIO(shrunk))
    np.testing.assert_array_equal(before, after)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_generator_renders_every_kind_of_file(generate: ModuleType, tmp_path: Path) -> None:
    kinds = {clip.encoding: clip for clips in generate.plan().values() for clip in clips}
    for encoding, clip in kinds.items():
        generate.render(clip, tmp_path)
        info = soundfile.info(tmp_path / clip.path)
        assert (info.samplerate, info.channels) == (encoding.rate, encoding.channels)
        assert (info.format, info.subtype) == (encoding.container, encoding.subtype)


def test_units_come_as_an_asr_item_and_its_swapped_tts_item() -> None:
    record = records("dev")[0]
    raw = [json.dumps(item).encode() for item in imported("make_units").items(record, [7, 90, 7])]
    asr, tts = (FORMAT.parse(item, Path("dev.json"), 1) for item in raw)
    assert (asr.task, asr.input, asr.output) == ("asr", (Units((7, 90, 7)),), (record["text"],))
    assert (tts.task, tts.input, tts.output) == ("tts", asr.output, asr.input)
    assert tts.id == f"tts_{asr.id}"


@pytest.mark.parametrize("recipe", ["asr", "units", "whisper", "tts_patch"])
def test_recipes_are_configs_whose_encoder_can_be_made(
    recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    config = load_config(f"examples/spoken_digits/{recipe}.yaml")
    encoder = make_encoder(config.model, config.data, tmp_path)
    assert encoder.end_id == encoder.tokenizer.eos_token_id
