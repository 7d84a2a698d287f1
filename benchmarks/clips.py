"""What do short clips cost a model whose encoder was trained on rows of 30 s?

A training step (forward, backward) of Qwen2-Audio from random weights, an encoder of 4 layers and a
language model of 4, width 256, 80 mels, on 6 clips of one mean length (normal, a third of it as
standard deviation, 0.5 to 30 s; the last of 30 s each), float32, one thread. Two ways in turn, on
the same batch: layers over one row of what is heard (raysft's); and transformers' own encoder over
whole rows. A figure is the smallest processor time of the rounds. Full run: about 2 minutes on a
core, 1.5 GB of memory.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import results_io
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

from raysft.config.schema import Data, Model
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import Audio, Example, MicroBatch
from raysft.families.audio_lm import cut
from raysft.families.audio_lm.model import AudioLM
from raysft.models import build

CLIPS, ROUNDS = 6, 3
SECONDS = (2, 4, 8, 15, 30)
QUICK_SECONDS = (2, 30)


def config(width: int, layers: int) -> dict[str, Any]:
    """Of encoder and language model."""
    return {
        "model_type": "qwen2_audio",
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "d_model": width,
            "encoder_layers": layers,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 4 * width,
            "num_mel_bins": 80,
            "max_source_positions": 1500,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": width,
            "intermediate_size": 8 * width // 3,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
    }


def batch_of(encoder: Encoder, mean: int) -> tuple[MicroBatch, float]:
    """Clips of noise, and how many seconds they have in all."""
    rng = np.random.default_rng(mean)
    lengths = np.clip(rng.normal(mean, mean / 3, CLIPS), 0.5, 30) if mean < 30 else [30.0] * CLIPS
    sequences = []
    for number, seconds in enumerate(lengths):
        wave = 0.1 * rng.standard_normal(int(seconds * 16000)).astype(np.float32)
        example = Example(str(number), "asr", (Audio("noise"),), ("one two three",))
        sequences.append(encoder.encode(example, [wave]))
    return MicroBatch.join(0, 1, 0, sequences), float(sum(lengths))


def step(model: AudioLM, batch: MicroBatch, whole: bool) -> tuple[float, float]:
    """Processor seconds of a step, and its loss. whole: rows as transformers has them."""
    tower, frames_of = model.net.model.audio_tower, cut.frames_of
    model.model.zero_grad()
    if whole:
        forward = vars(tower).pop("forward")
        cut.frames_of = lambda frames, limit: limit
    begun = time.process_time()
    loss = model.loss(model.collate(batch))[0].trained
    assert loss is not None
    loss.backward()
    seconds = time.process_time() - begun
    if whole:
        vars(tower)["forward"], cut.frames_of = forward, frames_of
    return seconds, float(loss.detach())


def measured(model: AudioLM, encoder: Encoder, mean: int) -> dict[str, Any]:
    """A line of results."""
    batch, seconds = batch_of(encoder, mean)
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for whole in (True, False):
            found[whole].append(step(model, batch, whole))
    whole, ours = (min(seconds for seconds, _ in found[way]) for way in (True, False))
    difference = abs(found[True][0][1] / found[False][0][1] - 1)
    line = {
        "mean_s": mean,
        "audio_s": round(seconds, 1),
        "whole_rows_s": round(whole, 3),
        "cut_s": round(ours, 3),
        "faster": round(whole / ours, 2),
        "loss_differs_by": difference,
    }
    print(" ".join(f"{key}={value:g}" for key, value in line.items()), flush=True)
    return line


def figure(lines: list[dict[str, Any]]) -> Figure:
    """Seconds of a step, both ways."""
    drawn, axis = pyplot.subplots(figsize=(6, 4))
    for key, label in (("whole_rows_s", "rows of 30 s"), ("cut_s", "what clips have")):
        axis.plot([x["mean_s"] for x in lines], [x[key] for x in lines], marker="o", label=label)
    axis.set(xlabel="mean length of clips, s", ylabel=f"step of {CLIPS} clips, s", ylim=(0, None))
    axis.set_title("Qwen2-Audio: what the encoder computes")
    axis.legend()
    return drawn


def main() -> None:
    """Measure, write JSON and PNG."""
    options = results_io.arguments(__doc__ or "")
    torch.set_num_threads(1)
    settings = Model(config=config(*((64, 2) if options.quick else (256, 4))), tokenizer="bytes")
    encoder = make_encoder(settings, Data(), "unused")
    model = build(settings, Data(), encoder, 0)
    assert isinstance(model, AudioLM)
    seconds = QUICK_SECONDS if options.quick else SECONDS
    lines = [measured(model, encoder, mean) for mean in seconds]
    payload = {"clips": CLIPS, "rounds": ROUNDS, "parameters": "random", "steps": lines}
    quick, out = options.quick, options.out
    print(results_io.write("clips", payload, figure(lines), quick=quick, out=out))


if __name__ == "__main__":
    main()
