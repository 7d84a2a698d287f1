"""Clips that are varied: encoders and readers that do it, what tests of augmentation share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raysft.config.schema import Config, Data, Model, Source
from raysft.data.clips.audio import Limits
from raysft.data.clips.augment import Augmentation
from raysft.data.clips.recordings import Pools
from raysft.data.encode import make_encoder
from raysft.data.encode.base import Encoder
from raysft.data.example import MicroBatch
from raysft.data.index.build import build_index
from raysft.data.read.reader import Reader, Work
from raysft.driver import pools
from raysft.run.ownership import ANYONE
from tests.support.models import AUDIO

RATE = 16000
CLIPS = 12
# All that needs no recordings, each half of the time.
MANY: dict[str, Any] = {
    "speed": {"p": 0.5, "factors": [0.8, 0.9, 1.1, 1.2]},
    "reverb": {"p": 0.5},
    "band": {"p": 0.5, "low_hz": [200, 400]},
    "codec": {"p": 0.5, "kinds": ["mulaw", "gsm", "vorbis"]},
    "volume": {"p": 0.5},
    "spec": {"p": 0.5},
}


def encoder_of(corpus: Path, augment: dict[str, Any] | None, **data: Any) -> Encoder:
    return make_encoder(Model(**AUDIO), Data(augment=augment, **data), corpus.parent)


def reader_of(
    corpus: Path, augment: dict[str, Any] | None, seed: int | None = 0, **data: Any
) -> Reader:
    """With as much room as was planned."""
    encoder = encoder_of(corpus, augment, **data)
    index = build_index([Source(path=str(corpus))], "train", encoder, corpus.parent / "index")
    return Reader(index, encoder, int(index.tokens.sum()), seed)


def everything(reader: Reader, step: int = 1, **work: Any) -> MicroBatch:
    """All examples as one micro-batch."""
    rows = np.arange(len(reader.index))
    return next(reader.read_chunk([replace(Work(0, step, 0, rows), **work)]))


def clips_of(batch: MicroBatch) -> list[bytes]:
    """Features of each example, to the bit."""
    parts = batch.arrays["features"].of_sequences(len(batch.ids))
    return [features.tobytes() for (features,) in parts]


def drawn(step: int = 1, slot: int = 0, seed: int = 0) -> np.random.Generator:
    """Of an example, as the reader makes it."""
    counter = [0, step, 0, slot]
    return np.random.Generator(np.random.Philox(counter=counter, key=[seed, 0]))


def varied(augment: dict[str, Any], clip: np.ndarray, step: int = 0, **more: Any) -> np.ndarray:
    about = Augmentation(Data(augment=augment).augment, **more)
    return about.varied(clip, RATE, drawn(step), 0, about.factors, Limits())


def run_with(corpus: Path, folder: Path, **augment: Any) -> tuple[Reader, Pools, list[str]]:
    """What a run prepares: with its recordings kept in `folder`, and what was said."""
    said: list[str] = []
    data = {"train": [{"path": str(corpus)}], "augment": augment}
    config = Config.model_validate({"data": data, "model": AUDIO})
    folder.mkdir(exist_ok=True)
    found = pools.listed(config, folder, folder, said.append)
    assert found is not None
    encoder = make_encoder(config.model, config.data, folder)
    index = build_index(config.data.train, "train", encoder, corpus.parent / "index")
    found = pools.voices(config, found, index, said.append)
    pools.keep(found, folder, ANYONE)
    encoder = make_encoder(config.model, config.data, folder)
    return Reader(index, encoder, 10**6, 0), found, said
