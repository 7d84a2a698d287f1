"""Tiny flow decoders, and corpora of clips with tokens and embeddings for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

RATE = 16000
SPEAKER = 6
SIZES = {
    "unit_width": 16,
    "encoder_width": 16,
    "encoder_heads": 2,
    "encoder_ffn": 24,
    "encoder_blocks": 2,
    "encoder_up_blocks": 1,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "ffn": 24,
    "speaker_width": SPEAKER,
}
MEL = {"rate": RATE, "n_fft": 640, "win": 640, "hop": 320, "bins": 8}  # 50 frames a second


def model(kind: str = "dit", **more: Any) -> dict[str, Any]:
    """The `model` section: dit of two codebooks, `one` of one codebook, or voicebox."""
    settings = {"model_type": "raysft_flow_decoder", **SIZES, "mel": dict(MEL)}
    books: dict[str, Any] = {"codebooks": [5, 9]}
    if kind == "one":
        books = {"codebooks": [20]}
    if kind == "voicebox":
        books = {"estimator": "voicebox", "codebooks": [20], "conv_groups": 4, "speaker_width": 0}
        books |= {"conv_width": 5}
    return {"config": {**settings, **books, **more}}


def tokens_of(kind: str, seconds: float, rng: np.random.Generator) -> list[int]:
    """Random tokens of a clip: what a source would have."""
    if kind == "dit":
        groups = round(seconds * 25 / 3)
        first, second = rng.integers(0, 5, (groups, 2)), 5 + rng.integers(0, 9, (groups, 3))
        return np.concatenate([first, second], 1).ravel().tolist()
    rate = 50 if kind == "voicebox" else 25
    return rng.integers(0, 20, round(seconds * rate)).tolist()


def corpus(folder: Path, kind: str = "dit", count: int = 24) -> Path:
    """JSON lines of clips of 0.12 to 0.6 s."""
    path = folder / f"{kind}.jsonl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(3), []
    for number in range(count):
        seconds = 0.12 * (1 + number % 5)
        clip = 0.1 * rng.standard_normal(int(seconds * RATE))
        soundfile.write(folder / f"{number}.wav", clip.astype(np.float32), RATE)
        line = {"id": f"f{number}", "wav": f"{number}.wav"}
        line["speech_token"] = tokens_of(kind, seconds, rng)
        line["spk_embedding"] = rng.standard_normal(SPEAKER).round(4).tolist()
        lines.append(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def base(folder: Path, kind: str = "dit", **more: Any) -> Path:
    """A folder with such a decoder, whose every weight is random: that of a new one lets little
    through."""
    from raysft.config.schema import Data, Model
    from raysft.data.encode import make_encoder
    from raysft.export import export
    from raysft.models import build

    target = folder / f"base_{kind}"
    if target.exists():
        return target
    section, data = Model(**model(kind, **more)), Data(mode="padded")
    built = build(section, data, make_encoder(section, data, folder), 1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in built.net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return export(built, target)
