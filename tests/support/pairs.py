"""Tiny pairs of a language model and a flow decoder, and a corpus that both learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tests.support import flows
from tests.support.models import CAUSAL

UNITS = 20
RATE = flows.RATE


def corpus(folder: Path, count: int = 24) -> Path:
    """JSON lines of texts and their clips, of 0.2 to 0.6 s."""
    folder.mkdir(parents=True, exist_ok=True)
    path, rng, lines = folder / "said.jsonl", np.random.default_rng(3), []
    for number in range(count):
        seconds = 0.2 + 0.08 * (number % 6)
        clip = 0.1 * rng.standard_normal(int(seconds * RATE))
        soundfile.write(folder / f"{number}.wav", clip.astype(np.float32), RATE)
        line = {"audio_filepath": f"{number}.wav", "text": f"say {number}", "duration": seconds}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    return path


def llm() -> dict[str, Any]:
    """The `model` section of the language model alone."""
    return {**CAUSAL}


def flow() -> dict[str, Any]:
    """That of the flow decoder alone."""
    return flows.model("one", speaker_width=0)


def model(**more: Any) -> dict[str, Any]:
    """That of the pair."""
    parts = {"text_config": CAUSAL["config"], "flow_config": flow()["config"]}
    return {"tokenizer": "bytes", "config": {"model_type": "raysft_pair", **parts, **more}}


def data(folder: Path, **more: Any) -> dict[str, Any]:
    """The `data` section."""
    source = {"path": str(corpus(folder)), "task": "tts"}
    units = {"clusters": UNITS, "path": str(folder / "units.safetensors")}
    return {"train": [source], "speech_tokens": units, "mode": "padded", **more}
