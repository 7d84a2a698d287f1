"""Embeddings of who speaks, before the shards: of every utterance, then the mean of each speaker.

    <prepare.path>/state/embeddings/000000.npz   of a shard's utterances, in their order
                                    speakers.npz   of all speakers, once all are there

A speaker's is the plain mean of the embeddings of all of the corpus's utterances with that name in
`spk`; an utterance without a speaker stands for itself.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raysft.data.clips.audio import Limits
from raysft.data.clips.stalled import ClipReader
from raysft.data.example import Example
from raysft.errors import BadExample
from raysft.prepare import shard
from raysft.prepare.listener import Listener
from raysft.prepare.shard import Embedded


def place(folder: Path, number: int) -> Path:
    """Where the embeddings of a shard are."""
    return folder / "state" / "embeddings" / f"{number:06d}.npz"


def make(
    folder: Path, number: int, examples: Sequence[Example], limits: Limits, listener: Listener
) -> None:
    """Hear the utterances of a shard and write their embeddings, whole or not at all."""
    reader = ClipReader(limits)
    values: list[np.ndarray] = []
    refused: list[str] = []
    kinds: list[str] = []
    for example in examples:
        refusal, kind = "", ""
        try:
            clip, _ = shard.spoken(example)
            values.append(listener.hear(shard.samples(reader, clip, listener.sample_rate, limits)))
        except BadExample as error:
            refusal, kind = str(error), error.kind or ""
        refused.append(refusal)
        kinds.append(kind)
    _put(
        place(folder, number),
        values=np.stack(values) if values else np.zeros((0, 0), np.float32),
        refused=np.array(refused, dtype=np.str_),
        kinds=np.array(kinds, dtype=np.str_),
        speakers=np.array([example.speaker or "" for example in examples], dtype=np.str_),
    )


def average(folder: Path, shards: int) -> None:
    """The mean of each speaker, of all shards' embeddings in their order."""
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for number in range(shards):
        with np.load(place(folder, number)) as found:
            heard = found["speakers"][found["refused"] == ""].tolist()
            for speaker, value in zip(heard, found["values"].astype(np.float64), strict=True):
                if speaker:
                    sums[speaker] = sums[speaker] + value if speaker in sums else value
                    counts[speaker] = counts.get(speaker, 0) + 1
    names = sorted(sums)
    means = [(sums[name] / counts[name]).astype(np.float32) for name in names]
    _put(
        folder / "state" / "embeddings" / "speakers.npz",
        names=np.array(names, dtype=np.str_),
        means=np.stack(means) if means else np.zeros((0, 0), np.float32),
    )


def means(folder: Path) -> dict[str, np.ndarray]:
    """float32 [dimensions] of each speaker."""
    with np.load(folder / "state" / "embeddings" / "speakers.npz") as found:
        return dict(zip(found["names"].tolist(), found["means"], strict=True))


def of_shard(folder: Path, number: int, by_speaker: dict[str, np.ndarray]) -> list[Embedded]:
    """Of each of a shard's utterances, in their order."""
    made: list[Embedded] = []
    with np.load(place(folder, number)) as found:
        values = iter(found["values"])
        told = zip(
            found["speakers"].tolist(),
            found["refused"].tolist(),
            found["kinds"].tolist(),
            strict=True,
        )
        for speaker, refusal, kind in told:
            if refusal:
                made.append(BadExample(refusal, kind or None))
            else:
                own = next(values)
                made.append((own, by_speaker[speaker] if speaker else own))
    return made


def _put(path: Path, **arrays: np.ndarray) -> None:
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    shard.put(path, out.getvalue())
