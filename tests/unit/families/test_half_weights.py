"""Models that hear, with weights in half precision and no autocast: as DeepSpeed has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from raysft.config.schema import Data, Model
from raysft.data.encode import make_encoder
from raysft.data.example import Audio, Example, MicroBatch
from raysft.evaluate.run import prompts_of
from raysft.models import build
from raysft.models.base import SpeechModel
from raysft.run.lines import read_lines
from tests.support import audio_zoo, seq2seq, whisper, worlds
from tests.unit.families.test_seq2seq_runs import config

KINDS = ("whisper", "moonshine", "cohere_asr", "canary", "qwen3_asr", "glmasr", "granite_speech")


def made(kind: str, folder: Path) -> tuple[SpeechModel, MicroBatch]:
    """A model of `kind` that does not drop out, and two clips for it."""
    if kind in audio_zoo.TINY:
        place = audio_zoo.save(kind, folder / kind)
        model, data = Model(path=str(place), family="audio_lm"), Data()
    elif kind == "whisper":
        model, data = Model(**whisper.model(folder)), Data(mode="padded", language="en")
    else:
        told = seq2seq.TINY[kind].told
        model = Model(**seq2seq.model(kind, folder))
        data = Data(mode="padded", language="de" if told else None)
    encoder = make_encoder(model, data, folder)
    found = build(model, data, encoder, 0)
    found.model.eval()
    clips = [audio_zoo.clip(samples, seed) for seed, samples in enumerate((8000, 12000))]
    examples = [Example(str(n), "asr", (Audio("x"),), ("one",)) for n in range(2)]
    items = [encoder.encode(e, [clip]) for e, clip in zip(examples, clips, strict=True)]
    return found, MicroBatch.join(0, 1, 0, items)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_answers_of_half_weights(kind: str, tmp_path: Path) -> None:
    speech_model, batch = made(kind, tmp_path)
    with torch.no_grad():
        whole = float(speech_model.loss(speech_model.collate(batch))[0].sum)
        for parameter in speech_model.net.parameters():  # DeepSpeed leaves buffers as they are
            parameter.data = parameter.data.to(torch.bfloat16)
        half = float(speech_model.loss(speech_model.collate(batch))[0].sum)
    assert np.isfinite(half) and half == pytest.approx(whole, rel=2e-2)
    assert len(speech_model.generate(prompts_of(speech_model, batch), 3)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy", "precision"),
    [("whisper", "zero1", "bf16"), ("moonshine", "zero3", "bf16"), ("canary", "zero2", "fp16")],
)
def test_a_run_under_deepspeed_trains_and_is_evaluated(
    kind: str, strategy: str, precision: str, tmp_path: Path
) -> None:
    language = {"whisper": "zh", "canary": "fr"}.get(kind)
    model = whisper.model(tmp_path) if kind == "whisper" else seq2seq.model(kind, tmp_path)
    asked = config(
        tmp_path,
        "half",
        model=model,
        data={"language": language},
        parallel={"strategy": strategy},
        train={"precision": precision},
    )
    path = tmp_path / "half.yaml"
    path.write_text(yaml.safe_dump(asked.model_dump(mode="json", exclude_unset=True)))
    assert worlds.run(2, path) == 0
    (figures,) = read_lines(tmp_path / "runs" / "half" / "eval.jsonl")
    assert np.isfinite(figures["loss/asr"]) and figures["wer/dev"] > 0
