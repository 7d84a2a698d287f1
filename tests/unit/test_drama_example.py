"""The example corpus of performances: what its records, clips and tokenizer promise."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.stats
import soundfile
import yaml
from transformers import AutoTokenizer

from raysft.config.schema import Source
from raysft.data import sources
from raysft.scorers.agreement import alpha

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "drama"
SPLITS = ("train", "dev", "test")
FIELDS = ("pitch_variation", "pace", "loudness")
FRAME_S, HOP_S = 0.05, 0.02
LOWEST_HZ, HIGHEST_HZ = 60, 500


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drama_make_data", FOLDER / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def records(split: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


def of(split: str, field: str) -> set[str]:
    return {record[field] for record in records(split)}


def test_records_are_what_the_script_plans(make_data: ModuleType) -> None:
    splits = make_data.plan()
    assert set(splits) == set(SPLITS)
    for split, clips in splits.items():
        assert (FOLDER / f"{split}.jsonl").read_text() == "".join(make_data.records(clips))
    assert make_data.plan(1) == make_data.plan(1) != splits


def test_every_file_is_named_by_one_record_and_ids_are_unique() -> None:
    every = [record for split in SPLITS for record in records(split)]
    present = [file.relative_to(FOLDER).as_posix() for file in FOLDER.glob("audio/*/*")]
    assert sorted(record["wav_path"] for record in every) == sorted(present)
    assert len({record["id"] for record in every}) == len(every)
    assert sum(file.stat().st_size for file in FOLDER.glob("audio/*/*")) < 5e6


def test_lines_and_voices_of_test_are_heard_nowhere_in_training() -> None:
    assert not of("test", "transcript") & (of("train", "transcript") | of("dev", "transcript"))
    assert not of("dev", "transcript") & of("train", "transcript")
    assert not of("test", "voice") & of("train", "voice")
    assert of("dev", "voice") == of("train", "voice")


def test_every_record_is_read_and_every_dimension_of_it_asked_about() -> None:
    judging = {"rubrics": str(FOLDER / "rubrics.yaml")}
    given = Source(path=str(FOLDER / "test.jsonl"), judging=judging)
    source = sources.resolve(given, "eval")
    found = list(sources.scan(source, source.files[0]))
    assert not [item.error for item in found if item.error]
    assert len(found) == len(FIELDS) * len(records("test"))


def test_raters_are_near_the_truth_and_agree() -> None:
    rows = [
        (record["truth"][field], record["annotations"][field])
        for split in SPLITS
        for record in records(split)
        for field in FIELDS
    ]
    off = [abs(rating - truth) for truth, given in rows for rating in given]
    assert set(off) == {0, 1} and 0.1 < np.mean(off) < 0.25
    assert all(len(given) == 3 for _, given in rows)
    assert {truth for truth, _ in rows} == {1, 2, 3, 4, 5}
    agreed = alpha([given for _, given in rows])
    assert agreed is not None and 0.85 < agreed < 0.97


def test_what_is_rated_can_be_measured_in_the_clips() -> None:
    """By other means than the model's: pitch by autocorrelation, syllables' rate by the letters a
    second, loudness by the mean power."""
    measured: dict[str, list[tuple[int, float]]] = {field: [] for field in FIELDS}
    for record in records("test"):
        samples, rate = soundfile.read(FOLDER / record["wav_path"])
        assert rate == 16000
        assert 0.4 < len(samples) / rate < 4.0 and np.abs(samples).max() < 1.2
        measures = {
            "pitch_variation": movement(samples, rate),
            "pace": len(record["transcript"]) / len(samples) * rate,
            "loudness": 10 * np.log10(np.mean(samples**2)),
        }
        for field, value in measures.items():
            measured[field].append((record["truth"][field], value))
    for field, least in zip(FIELDS, (0.85, 0.9, 0.97), strict=True):
        found = scipy.stats.spearmanr(*zip(*measured[field], strict=True)).statistic
        assert found > least, (field, found)


def movement(samples: np.ndarray, rate: int) -> float:
    """How far the pitch moves: the middle 80% of the voiced frames' pitches, in semitones."""
    size, shortest, longest = int(FRAME_S * rate), rate // HIGHEST_HZ, rate // LOWEST_HZ
    loud = 0.1 * np.abs(samples).max()
    pitches = []
    for start in range(0, len(samples) - size, int(HOP_S * rate)):
        frame = samples[start : start + size] * np.hanning(size)
        if np.abs(frame).max() < loud:
            continue
        spectrum = np.fft.rfft(frame, 2 * size)
        window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)
        found = np.fft.irfft(np.abs(spectrum) ** 2)
        similar = (found / found[0]) / (window / window[0])
        best = similar[shortest:longest].max()
        if best > 0.7:  # voiced; twice the period is as similar as the period
            near = np.flatnonzero(similar[shortest:longest] > 0.9 * best)[0]
            lag = shortest + near + int(np.argmax(similar[shortest + near :][:8]))
            pitches.append(12 * np.log2(rate / lag))
    low, high = np.percentile(pitches, [10, 90])
    return float(high - low)


def test_movement_is_in_semitones() -> None:
    time = np.arange(32000) / 16000
    steady = np.sin(2 * np.pi * 200 * time)
    octave = np.sin(2 * np.pi * 200 * np.where(time < 1, time, 2 * time))
    assert movement(steady, 16000) < 0.1
    assert movement(octave, 16000) == pytest.approx(12, abs=0.5)


def test_the_tokenizer_on_disk_is_the_one_the_script_builds(make_data: ModuleType) -> None:
    built = make_data.build_tokenizer()
    loaded = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    assert loaded.get_vocab() == built.get_vocab()
    assert loaded.backend_tokenizer.to_str() == built.backend_tokenizer.to_str()
    ids = loaded.encode("<answer>4</answer>", add_special_tokens=False)
    assert len(ids) == 3 and loaded.decode(ids) == "<answer>4</answer>"


def test_a_start_is_the_model_of_sft() -> None:
    """Of both recipes, so that their figures can be held against each other."""
    (pitch, rest), (weak, grpo) = (
        yaml.safe_load((FOLDER / name).read_text())["stages"] for name in ("sft.yaml", "grpo.yaml")
    )
    assert weak["model"] == pitch["model"] and rest["model"] == {"path": "stages.pitch"}
    assert weak["train"]["max_steps"] < rest["train"]["max_steps"]
    assert grpo["train"]["objective"] == "grpo" and grpo["model"] == {"path": "stages.weak"}


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_a_clip_is_as_loud_as_it_is_planned(make_data: ModuleType, tmp_path: Path) -> None:
    clip = make_data.plan()["test"][0]
    make_data.render(clip, tmp_path, make_data.spoken_digits())
    samples, _ = soundfile.read(tmp_path / clip.path)
    loudness = 10 * np.log10(np.mean(samples**2))
    assert loudness == pytest.approx(clip.level, abs=4.0)  # Opus takes some
