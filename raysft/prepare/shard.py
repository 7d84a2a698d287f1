"""One shard: examples -> a Parquet file that a source of the format `shards` reads by place.

Pure but for the clips it reads and the file it writes: the same examples and settings give the same
bytes. Its audio column is written as Parquet's plainest: required, not packed, one page a group of
rows, so that a clip's bytes lie in the file as they are (sources/shards.py finds them).
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from raysft.config.prepare import Prepare
from raysft.data.clips import audio
from raysft.data.clips.file import File
from raysft.data.clips.stalled import ClipReader
from raysft.data.example import Audio, Example, Quarantined
from raysft.data.sources.shards import AUDIO, IDS
from raysft.errors import BadExample, UserError

GROUP_BYTES = 1 << 30  # of audio in a group of rows: its page has to stay below 2 GiB
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
SCHEMA = pa.schema(
    [
        pa.field("utt", pa.string(), nullable=False),
        pa.field("wav", pa.string(), nullable=False),
        pa.field(AUDIO, pa.binary(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("spk", pa.string(), nullable=False),
        pa.field("utt_embedding", pa.list_(pa.float32())),
        pa.field("spk_embedding", pa.list_(pa.float32())),
        pa.field("speech_token", pa.list_(pa.int32())),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("samples", pa.int64(), nullable=False),
        pa.field("sample_rate", pa.int32(), nullable=False),
        pa.field("audio_bytes", pa.int64(), nullable=False),
    ]
)
_PACKED = [name for name in SCHEMA.names if name != AUDIO]


class Tokenizer(Protocol):
    """What turns clips into speech tokens."""

    sample_rate: int

    def tokens(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] at `sample_rate` -> int32 [tokens]. Raises BadExample."""


Embedded = tuple[np.ndarray, np.ndarray] | BadExample
"""Of an utterance and of its speaker, float32 [dimensions] each; or why there is none."""


@dataclass
class Made:
    """A shard's columns (lists by name), and what could not be used."""

    columns: dict[str, list[object]]
    rejected: list[Quarantined]


def make(
    examples: Sequence[tuple[Example, str]],
    settings: Prepare,
    limits: audio.Limits,
    tokenizer: Tokenizer | None = None,
    embedded: Sequence[Embedded] | None = None,
) -> Made:
    """The rows of a shard. examples: with the name of their source; embedded: of each.

    An example whose clip cannot be read, or that is no clip with a text, costs its row. Raises
    UserError where the storage fails.
    """
    reader = ClipReader(limits)
    made = Made({name: [] for name in SCHEMA.names}, [])
    for number, (example, source) in enumerate(examples):
        try:
            clip, text = spoken(example)
            content, measured = reader.call(lambda one: _content(one, settings, limits), clip)
            tokens = None
            if tokenizer is not None:
                tokens = tokenizer.tokens(samples(reader, clip, tokenizer.sample_rate, limits))
            of_utterance, of_speaker = _embedded(embedded, number)
        except BadExample as error:
            path = next((one.path for one in example.audio()), "")
            made.rejected.append(Quarantined(example.id, source, path, str(error), error.kind))
            continue
        row = {
            "utt": example.id,
            "wav": clip.path,
            AUDIO: content,
            "text": text,
            "spk": example.speaker or "",
            "utt_embedding": of_utterance,
            "spk_embedding": of_speaker,
            "speech_token": tokens,
            "seconds": measured.samples / measured.rate,
            "tokens": 0 if tokens is None else len(tokens),
            "task": example.task,
            "samples": measured.samples,
            "sample_rate": measured.rate,
            "audio_bytes": len(content),
        }
        for name, values in made.columns.items():
            values.append(row[name])
    return made


def _embedded(
    embedded: Sequence[Embedded] | None, number: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    if embedded is None:
        return None, None
    found = embedded[number]
    if isinstance(found, BadExample):
        raise found
    return found


def samples(reader: ClipReader, clip: Audio, rate: int, limits: audio.Limits) -> np.ndarray:
    """float32 [samples] of a clip at `rate` Hz. Raises BadExample."""
    return reader.call(lambda one: audio.load(one, rate, limits), clip)


def spoken(example: Example) -> tuple[Audio, str]:
    """The clip of an example, and what is said in it. Raises BadExample where it is not one of
    each."""
    clips = example.audio()
    if len(clips) != 1 or example.text is None or example.turns:
        raise BadExample(
            f"has {len(clips)} clips, and {'no' if example.text is None else 'a'} text: a shard's "
            "row is a clip and what is said in it",
            "not one clip",
        )
    return clips[0], example.text


def _content(clip: Audio, settings: Prepare, limits: audio.Limits) -> tuple[bytes, audio.Probed]:
    """The bytes of a clip as its row has them, and what they hold."""
    own = audio.probe(clip, limits)
    if settings.audio == "none":
        return b"", own
    if settings.audio == "keep" and not clip.part and settings.rate in (None, own.rate):
        with closing(File(clip.path, True, clip.bytes, clip.held)) as file:
            return file.read(0, file.size), own
    rate = settings.rate or own.rate
    kind = "flac" if settings.audio == "keep" else settings.audio
    if kind == "opus" and rate not in OPUS_RATES:
        rate = next((known for known in OPUS_RATES if known >= rate), OPUS_RATES[-1])
    content = encoded(audio.load(clip, rate, limits), rate, kind)
    return content, audio.probe(Audio(clip.path, bytes=content), audio.ANY)


def encoded(samples: np.ndarray, rate: int, kind: str) -> bytes:
    """float32 [samples] as a flac (16 bit) or opus file."""
    out = io.BytesIO()
    if kind == "flac":
        soundfile.write(out, samples, rate, format="FLAC", subtype="PCM_16")
    else:
        soundfile.write(out, samples, rate, format="OGG", subtype="OPUS")
    return out.getvalue()


def write(path: Path, columns: dict[str, list[object]]) -> None:
    """Write a shard and its ids, each whole or not at all. Raises OSError."""
    table = pa.table(columns, SCHEMA)
    sizes = [len(content) for content in columns[AUDIO]]  # type: ignore[arg-type]
    ids = "".join(f"{name}\n" for name in columns["utt"])
    put(path.with_name(path.stem + IDS), ids.encode("utf-8"))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with pq.ParquetWriter(
            temporary,
            SCHEMA,
            compression=dict.fromkeys(_PACKED, "ZSTD") | {AUDIO: "NONE"},
            use_dictionary=False,
            write_statistics=_PACKED,
            data_page_size=(1 << 31) - 1,
            write_batch_size=max(1024, len(sizes)),
            data_page_version="1.0",
        ) as writer:
            start = 0
            for stop in _groups(sizes):
                writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
                start = stop
            if not sizes:
                writer.write_table(table)
        _durable(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _groups(sizes: list[int]) -> list[int]:
    """Where groups of rows end."""
    ends, held = [], 0
    for row, size in enumerate(sizes):
        if held and held + size > GROUP_BYTES:
            ends.append(row)
            held = 0
        held += size
    return [*ends, len(sizes)] if sizes else []


def put(path: Path, content: bytes) -> None:
    """A small file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        _durable(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _durable(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check(settings: Prepare) -> None:
    """What of the settings contradicts itself. Raises UserError."""
    if settings.path is None:
        raise UserError("prepare.path: not given: name the folder that the shards are written to")
    if settings.audio == "opus" and settings.rate not in (None, *OPUS_RATES):
        rates = ", ".join(map(str, OPUS_RATES))
        raise UserError(f"prepare.rate: {settings.rate}: opus is of {rates} Hz; take one of these")
    if settings.audio == "none" and settings.rate is not None:
        raise UserError("prepare.rate: no audio is written (prepare.audio=none): leave it out")
