"""Tiny models of patch_lm, and corpora for them: to transcribe, to speak and to edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 16000
MEL = {"rate": RATE, "n_fft": 640, "win": 640, "hop": 320, "bins": 8, "mean": -5.0, "std": 3.0}
SIZE = 2  # frames of a patch, 40 ms
PATCH_S = SIZE * 320 / RATE
PATCHES = {"mel": MEL, "size": SIZE, "width": 16, "depth": 2, "heads": 2, "dropout": 0.0}
TEXT = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
WORDS = ("one", "two", "three", "four")


def model(**more: Any) -> dict[str, Any]:
    """The `model` section."""
    patches = {**PATCHES, **more}
    return {"family": "patch_lm", "tokenizer": "bytes", "config": dict(TEXT), "patches": patches}


def clip(folder: Path, name: str, patches: float, seed: int) -> str:
    """A clip of noise that has so many patches; its name."""
    rng = np.random.default_rng(seed)
    wave = 0.1 * rng.standard_normal(round(patches * PATCH_S * RATE))
    soundfile.write(folder / name, wave.astype(np.float32), RATE)
    return name


def corpus(folder: Path, count: int = 24) -> Path:
    """JSON lines of all tasks; clips of 2 to 10 patches, and a bit."""
    path = folder / "patches.jsonl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        wav = clip(folder, f"{number}.wav", 2.3 + number % 9, number)
        line: dict[str, str] = {"id": f"p{number}", "text": f"{WORDS[number % 4]} {number}"}
        line["task_type"] = ("tts", "asr", "edit")[number % 3]
        if line["task_type"] == "edit":
            other = clip(folder, f"{number}b.wav", 7.5 - number % 5, 100 + number)
            line |= {"prompt_wav_path": wav, "target_wav_path": other}
            line |= {"target_text": "said anew"} if number % 2 else {}
        else:
            line["wav_path"] = wav
        lines.append(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
