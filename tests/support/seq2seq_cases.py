"""A model of seq2seq that reads a clip at its own length, here and as transformers loads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, PreTrainedModel

from raysft.config.schema import Data, Model
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import Audio, Example, Sequence
from raysft.export import export
from raysft.models import SpeechModel, build
from tests.support import seq2seq as zoo

RATE = 16000
PADDED = Data(mode="padded")
KINDS = sorted(zoo.TINY)
LOUD = ("subsampling", "encoder_attn.o_proj", "encoder_attn.out_proj")
TOLD = [kind for kind in KINDS if zoo.TINY[kind].told]
SPOKEN = (  # samples, lang, task, text
    (8000, "en", "asr", "zero one"),
    (RATE, "de", "st", "a longer text, translated"),
    (31999, "German", "asr", "drei"),
    (5001, "fr", "asr", "ü"),
    (8000, "en", "asr", "of one length with the first"),
)
NAMES = ("input_features", "attention_mask", "decoder_input_ids")


def example(text: str = "one", lang: str | None = "en", task: str = "asr") -> Example:
    return Example("e", task, (Audio("/clip.wav"),), (text,), lang=lang, text=text)


def wave(samples: int, seed: int = 0) -> np.ndarray:
    """A tone of its own, and some noise."""
    tone = np.sin(2 * np.pi * 190 * 2**seed * np.arange(samples) / RATE)
    noise = np.random.default_rng(seed).standard_normal(samples)
    return (0.3 * tone + 0.01 * noise).astype(np.float32)


def model(kind: str, folder: Path, **config: Any) -> Model:
    return Model(**zoo.model(kind, folder, **config))


@dataclass(frozen=True)
class Case:
    """A type: its model and encoder here, and what transformers loads of its export."""

    kind: str
    ours: SpeechModel
    encoder: Encoder
    plain: PreTrainedModel
    processor: Any
    exported: Path
    spoken: list[tuple[Example, np.ndarray, Sequence]]

    def ids(self, one: Example) -> list[int]:
        """Of its text, by the tokenizer that transformers loads."""
        return self.processor.tokenizer(one.text or "", add_special_tokens=False).input_ids

    def inputs(self, one: Example, clip: np.ndarray) -> dict[str, Any]:
        """What transformers' processor alone makes of a clip, and of what is asked."""
        code = {"german": "de"}.get((one.lang or "en").lower(), one.lang)
        if self.kind == "cohere_asr":
            made = self.processor(clip, language=code, sampling_rate=RATE)
            return {name: torch.as_tensor(made[name]) for name in NAMES if name in made}
        if self.kind == "canary":
            target = "en" if one.task == "st" else code
            made = self.processor.apply_transcription_request(
                [clip], source_language=code, target_language=target
            )
            return {name: made[name] for name in NAMES if name in made}
        made = self.processor(clip, sampling_rate=RATE, return_tensors="pt")
        start = torch.tensor([[self.plain.config.decoder_start_token_id]])
        names = ("input_values", "input_features")
        return {name: made[name] for name in names if name in made} | {"decoder_input_ids": start}


def cases(factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """cases(factory)(kind): made once."""
    made: dict[str, Case] = {}

    def make(kind: str) -> Case:
        if kind not in made:
            made[kind] = _case(kind, factory.mktemp(kind))
        return made[kind]

    return make


def _case(kind: str, folder: Path) -> Case:
    section = model(kind, folder)
    encoder = make_encoder(section, PADDED, folder)
    ours = build(section, PADDED, encoder, 0)
    with torch.no_grad():  # norms and biases too, which start as ones and zeros
        for number, (name, parameter) in enumerate(ours.net.named_parameters()):
            noise = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
            if any(part in name for part in LOUD):  # else clips hardly count
                parameter.mul_(8)
    ours.model.eval()
    exported = export(ours, folder / "exported")
    plain = AutoModelForSpeechSeq2Seq.from_pretrained(exported).eval()
    spoken = []
    for number, (samples, lang, task, text) in enumerate(SPOKEN):
        task = task if kind == "canary" else "asr"
        one, clip = example(text, lang, task), wave(samples, number)
        planned = encoder.measure(one, [samples])
        spoken.append((one, clip, encoder.encode(one, [clip], promised=planned)))
    processor = AutoProcessor.from_pretrained(exported)
    return Case(kind, ours, encoder, plain, processor, exported, spoken)
