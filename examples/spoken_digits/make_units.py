"""Write the spoken digits as speech units: MoST instruction JSON for units.yaml.

    python examples/spoken_digits/make_units.py [--out FOLDER]

Reads the manifests beside it, fits k-means on training clips (raysft's speech tokenizer: log-mel
frames, 4 of 10 ms a unit) and writes train.json, dev.json, test.json and test_unseen.json, each
with an asr and a tts item a clip. Costs a few seconds; the same clips give the same units.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np

from raysft.config.speech_tokens import SpeechTokens
from raysft.data.clips.audio import load
from raysft.data.clips.speech_tokens import SAMPLE_RATE, KMeans, SpeechTokenizer

SPLITS = ("train", "dev", "test", "test_unseen")
SETTINGS = SpeechTokens(clusters=100, stack=4, fit_clips=500)
SEED = 0


def read_manifest(split: str) -> list[dict[str, str]]:
    """The records of `split`.jsonl."""
    return [json.loads(line) for line in (HERE / f"{split}.jsonl").read_text().splitlines()]


def read_clip(record: dict[str, str]) -> np.ndarray:
    """The clip of a record: float32 [samples], mono, 16 kHz."""
    return load(str(HERE / record["wav_path"]), SAMPLE_RATE)


def fit() -> SpeechTokenizer:
    """k-means on the first clips of train, which are in random order."""
    records = read_manifest("train")[: SETTINGS.fit_clips]
    return KMeans.fit((read_clip(record) for record in records), SETTINGS, SEED)


def items(record: dict[str, str], units: np.ndarray) -> list[dict[str, object]]:
    """A clip's two items: asr, and tts with input and output swapped. units: int [n]."""
    spoken = "".join(f"[Hu{unit}]" for unit in units)
    metadata = {"voice": record["voice"], "audio": record["wav_path"]}
    asr = {"id": record["id"], "instruction": "transcribe"}
    tts = {"id": f"tts_{record['id']}", "instruction": "say"}
    return [
        {**asr, "input": spoken, "output": record["text"], "metadata": {"task": "asr", **metadata}},
        {**tts, "input": record["text"], "output": spoken, "metadata": {"task": "tts", **metadata}},
    ]


def main() -> None:
    """Fit, encode all splits, write one JSON list a split, an item a line."""
    parser = argparse.ArgumentParser(description="Write the spoken digits as speech units.")
    parser.add_argument("--out", type=Path, default=HERE / "units", help="folder to write into")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = fit()
    tokenizer.save(out / "speech_tokens.safetensors")
    for split in SPLITS:
        lines = [
            json.dumps(item)
            for record in read_manifest(split)
            for item in items(record, tokenizer.encode(read_clip(record)))
        ]
        (out / f"{split}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
        print(f"{out / split}.json: {len(lines)} items")


if __name__ == "__main__":
    main()
