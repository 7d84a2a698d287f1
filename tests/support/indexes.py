"""Small corpora, an encoder of plain lengths, and their index: what the tests of it share."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import soundfile

from raysft.config.schema import Source
from raysft.data.clips import audio
from raysft.data.index.build import build_index
from raysft.data.sources import json_items, json_lines
from raysft.errors import BadExample, UserError

RATE = 16000


class Encoder:
    """Positions: a frame of 160 samples each, and a character each."""

    sample_rate = RATE
    limits = audio.Limits()

    def __init__(self, fingerprint="f"):
        self.fingerprint = fingerprint

    def measure(self, example, samples):
        if example.text == "too long":
            raise BadExample("longer than the model reads")
        if example.text == "impossible":
            raise UserError("set model.family")
        units = [len(p.ids) for p in example.input if hasattr(p, "ids")]
        return sum(n // 160 for n in samples) + sum(units) + len(example.text or "")

    def workload(self, example, samples):
        return sum(samples) / RATE

    def of_training(self):
        return self


def clip(path, seconds=0.5, rate=RATE, channels=1, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, (round(seconds * rate), channels))
    soundfile.write(path, noise, rate, **kwargs)
    aged(path)
    return path


def aged(*paths, seconds=100):
    """As they are, but not written just now."""
    then = time.time() - seconds
    for path in paths:
        os.utime(path, (then, then))


def jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(
        (record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records
    )
    path.write_text(text)
    return path


def asr(wav="a.wav", text="hello", **more):
    return {"task_type": "asr", "wav_path": wav, "text": text, **more}


def most(path, count, start=0):
    items = [
        {"id": f"m{i}", "input": "[Hu1]" * (1 + i % 7), "output": f"text {i}"}
        for i in range(start, start + count)
    ]
    path.write_text(json.dumps(items))
    return path


def build(folder, *paths, encoder=None, split="train", **kwargs):
    entries = [path if isinstance(path, Source) else Source(path=str(path)) for path in paths]
    return build_index(entries, split, encoder or Encoder(), folder, **kwargs)


def recorded_probes(monkeypatch):
    """Paths whose headers are read from now on."""
    seen = []
    real = audio.probe

    def probe(clip, limits):
        seen.append(Path(clip.path).name)
        return real(clip, limits)

    monkeypatch.setattr(audio, "probe", probe)
    return seen


def chunked_small(monkeypatch):
    """Chunks of some lines or items, so that small files have many."""
    monkeypatch.setattr(json_lines.survey, "__defaults__", (300,))
    monkeypatch.setattr(json_items.survey, "__defaults__", (300, 4))


def corpus(folder, count=40):
    """Ming lines over a few clips, of either task, some of them unusable."""
    for i in range(5):
        clip(folder / f"{i}.wav", 0.1 * (i + 1))
    records = []
    for i in range(count):
        record = asr(f"{i % 5}.wav", "x" * (i % 9 + 1))
        if i % 3 == 0:
            record["task_type"] = "tts"
        if i % 4:
            record["lang"] = ("de", "en", "zu")[i % 4 - 1]
        if i % 7 == 5:
            record["wav_path"] = "missing.wav"
        records.append("{broken" if i % 11 == 4 else record)
    return jsonl(folder / "corpus.jsonl", records)


def contents(index):
    names, language = index.languages
    columns = (index.tokens, index.seconds, index.task, index.source, language)
    return (
        [column.tolist() for column in columns],
        index.tasks,
        names,
        index.sources,
        index.examples(np.arange(len(index))),
        index.rejected,
        index.hash,
    )
