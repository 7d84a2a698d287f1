"""A run of a model of seq2seq from its data to its export, and what goes with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    WhisperForConditionalGeneration,
)

from raysft.config import Config
from raysft.data.encode import make_encoder
from raysft.driver import preview
from raysft.export import export_run, prompts
from raysft.parallel import World
from raysft.run.lines import read_lines
from raysft.train.job import Job
from raysft.train.loop import train
from tests.support import seq2seq as zoo
from tests.support import whisper
from tests.support.worlds import resolved, start

RATE = 16000
LANGUAGES = ("en", "de", None, "xx")


def config(folder: Path, name: str, **sections: dict[str, Any]) -> Config:
    """Of twelve clips of noise, three of them in a language that there is not."""
    manifest = folder / "train.jsonl"
    if not manifest.exists():
        rng, lines = np.random.default_rng(0), []
        for number in range(12):
            wave = 0.1 * rng.standard_normal(rng.integers(5000, 2 * RATE))
            soundfile.write(folder / f"{number}.wav", wave.astype(np.float32), RATE)
            line = {"task_type": "asr", "wav_path": f"{number}.wav", "text": f"text {number}"}
            lines.append(line | {"id": f"c{number}", "lang": LANGUAGES[number % 4]})
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree: dict[str, Any] = {
        "run": {"name": name, "storage_path": str(folder / "runs")},
        "data": {
            "train": [{"path": str(manifest)}],
            "eval": [{"path": str(manifest), "name": "dev"}],
            "mode": "padded",
            "lanes": 2,
            "tokens_per_batch": 500,
            "max_quarantined": 0.3,
            "language": "zh",
        },
        "model": whisper.model(folder),
        "optim": {"lr": 3e-3},
        "train": {"max_steps": 3},
        "evaluate": {"max_new_tokens": 6},
        "log": {"tensorboard": False, "every": 1},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return Config.model_validate(tree)


def trained(config: Config) -> Job:
    job = start(config, World.current())
    train(job)
    return job


def losses(job: Job) -> list[float]:
    return [line["loss"] for line in read_lines(job.folder / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is over."""
    return trained(config(tmp_path_factory.mktemp("whisper"), "run")).folder


def test_answers_of_an_evaluation_are_those_of_the_export(run: Path, tmp_path: Path) -> None:
    (figures,) = read_lines(run / "eval.jsonl")
    assert figures["sources"]["dev"]["examples"] == 9
    assert figures["wer/dev"] > 0 and figures["loss/asr"] > 0
    export_run(run, tmp_path / "out")
    plain = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    said = list(read_lines(run / "predictions" / "step_3.jsonl"))
    assert len(said) == 9
    for line in said:
        number = int(line["id"][1:])
        clip, _ = soundfile.read(run.parents[1] / f"{number}.wav", dtype="float32")
        heard = processor.feature_extractor(clip, sampling_rate=RATE, return_tensors="pt")
        tokens = plain.generate(
            heard.input_features,
            language=LANGUAGES[number % 4] or "zh",
            task="transcribe",
            max_new_tokens=6,
        )
        assert line["hypothesis"] == processor.batch_decode(tokens, skip_special_tokens=True)[0]
        assert line["reference"] == f"text {number}"


@pytest.mark.parametrize("kind", sorted(zoo.TINY))
def test_a_clip_read_at_its_own_length_is_trained_on_evaluated_and_exported(
    kind: str, tmp_path: Path
) -> None:
    told = zoo.TINY[kind].told
    data = {"language": "fr" if told else None}
    asked = config(tmp_path, "own", model=zoo.model(kind, tmp_path), data=data)
    job = trained(asked)
    prompt = make_encoder(asked.model, asked.data, job.folder).template
    found = losses(job)
    assert found[-1] < found[0] and torch.isfinite(torch.tensor(found)).all()
    (figures,) = read_lines(job.folder / "eval.jsonl")
    assert figures["sources"]["dev"]["examples"] == (9 if told else 12)
    assert figures["wer/dev"] > 0 and figures["loss/asr"] > 0
    export_run(job.folder, tmp_path / "out")
    plain = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    for line in read_lines(job.folder / "predictions" / "step_3.jsonl"):
        number = int(line["id"][1:])
        clip, _ = soundfile.read(tmp_path / f"{number}.wav", dtype="float32")
        extracted = processor.feature_extractor(clip, sampling_rate=RATE, return_tensors="pt")
        names = ("input_values", "input_features", "attention_mask")
        heard = {name: value for name, value in extracted.items() if name in names}
        start = prompt.prefix("asr", LANGUAGES[number % 4])
        tokens = plain.generate(**heard, decoder_input_ids=torch.tensor([start]), max_new_tokens=6)
        said = processor.tokenizer.decode(tokens[0, len(start) :], skip_special_tokens=True)
        assert line["hypothesis"] == said
        assert line["reference"] == f"text {number}"


def test_conversations_of_a_clip_and_its_text_are_trained_on_as_that(
    run: Path, tmp_path: Path
) -> None:
    """With the losses, answers and word error rate of the same examples in short; in the language
    of the config."""
    short, talk = [], []
    for raw in (run.parents[1] / "train.jsonl").read_text().splitlines():
        record = json.loads(raw)
        clip = str(run.parents[1] / record["wav_path"])
        short.append({key: record[key] for key in ("id", "text", "task_type")} | {"wav_path": clip})
        asked = {"role": "user", "content": "<audio>"}
        told = {"role": "assistant", "content": record["text"]}
        talk.append({"id": record["id"], "messages": [asked, told], "audios": [clip]})
    jobs = []
    for name, lines in (("short", short), ("talk", talk)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = {"path": str(path), "task": "asr"}
        data = {"train": [source], "eval": [source | {"name": "dev"}]}
        jobs.append(trained(config(tmp_path, name, data=data)))
    assert losses(jobs[0]) == losses(jobs[1])
    (expected,), (figures,) = (read_lines(job.folder / "eval.jsonl") for job in jobs)
    assert figures["wer/dev"] == expected["wer/dev"] and figures["loss/asr"] == expected["loss/asr"]
    kept, said = (list(read_lines(job.folder / "predictions" / "step_3.jsonl")) for job in jobs)
    assert [line["hypothesis"] for line in said] == [line["hypothesis"] for line in kept]
    assert [line["reference"] for line in said] == [f"text {line['id'][1:]}" for line in said]


def test_a_whisper_is_asked_nothing_in_words(run: Path) -> None:
    assert prompts(run) == {}


def test_metrics_count_what_the_encoder_computes(run: Path) -> None:
    for line in read_lines(run / "metrics.jsonl"):
        if "loss" in line:
            text = line["supervised_tokens"] + 4 * line["examples"]
            assert line["tokens"] == 100 * line["examples"] + text
            assert 0 <= line["padding"] < 0.02


def test_checkpointing_changes_no_loss(run: Path) -> None:
    folder = run.parents[1]
    again = trained(
        config(
            folder,
            "again",
            train={"max_steps": 3, "gradient_checkpointing": True},
            data={
                "eval": [],
            },
        )
    )
    kept = [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert losses(again) == pytest.approx(kept, rel=1e-6)


def test_a_run_in_half_precision_learns(run: Path) -> None:
    changes: dict[str, Any] = {"train": {"max_steps": 8, "precision": "bf16"}, "data": {"eval": []}}
    found = losses(trained(config(run.parents[1], "half", **changes)))
    assert torch.isfinite(torch.tensor(found)).all()
    assert found[-1] < found[0] - 0.02


def test_a_dry_run_shows_tokens_and_names_what_cannot_be_used(run: Path) -> None:
    said = preview.dry_run(resolved(config(run.parents[1], "dry")), show=1)
    assert "<|pad|> x 100 <|startoftranscript|><|en|><|transcribe|><|notimestamps|>" in said
    assert "6 unusable: 6 unknown language" in said  # of train, and of eval
    assert "line 4: its language 'xx' is unknown to the tokenizer, which has en, zh, de" in said
    assert "\u27e6text 0<|endoftext|>\u27e7" in said
