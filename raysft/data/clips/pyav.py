"""Formats that libsndfile does not know, where PyAV is installed: `pip install 'raysft[av]'`.

m4a and mp4 (AAC, ALAC), webm and mka, raw AAC, AMR, WMA, Speex and FLAC in Ogg. Their headers tell
a length only sometimes, and seldom without the encoder's padding: the index decodes such a file
once (1 to 3 ms a second of audio). A length that MP4 or Matroska does tell is a promise: what ends
long before it was cut off. Where such files are many, convert them first:
`ffmpeg -i clip.m4a clip.flac`.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Iterator
from itertools import chain
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from raysft.data.clips.file import File, Piece, Track, check_whole, decoding
from raysft.errors import BadExample

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

_MP4 = "an MP4 or M4A file"
_SIGNATURES = (
    (_MP4, re.compile(rb".{4}ftyp", re.DOTALL)),
    ("a WebM or Matroska file", re.compile(rb"\x1a\x45\xdf\xa3", re.DOTALL)),
    ("a raw AAC file", re.compile(rb"\xff[\xf0\xf1\xf8\xf9]", re.DOTALL)),
    ("an AMR file", re.compile(rb"#!AMR", re.DOTALL)),
    ("a WMA or ASF file", re.compile(bytes.fromhex("3026b2758e66cf11"), re.DOTALL)),
)
_PROMISING = ("mov,", "matroska,")  # demuxers whose lengths are not guesses
_MOST_BOXES = 100_000


def name(head: bytes) -> str | None:
    """What kind of file begins like this, of those that PyAV reads."""
    return next((name for name, begin in _SIGNATURES if begin.match(head)), None)


def track(file: File, kind: str) -> Track:
    """Raises BadExample where PyAV is not there, or finds no audio in the file."""
    try:
        av = importlib.import_module("av")
    except ImportError:
        raise BadExample(
            f"{file.path}: {kind}: not audio that is read without PyAV: install it on all nodes "
            "(pip install 'raysft[av]'), or convert the clip to flac",
            "not audio",
        ) from None
    if kind == _MP4:
        _check_boxes(file)
    view = _buffered(file.view())
    with decoding(file.path), av.open(view) as container:
        stream = _stream(container, file.path, kind)
        rate, channels = stream.rate, stream.channels
    return Track(
        rate,
        None,
        lambda most: _decode(av, file, kind, rate, most),
        count=lambda most: sum(map(len, _blocks(av, file, kind, most))),
        channels=channels,
    )


def _check_boxes(file: File) -> None:
    """Raises BadExample where an MP4 is cut off inside its sound, or another follows it, of which
    nothing would be read."""
    at = 0
    for _ in range(_MOST_BOXES):
        head = file.read(at, 16)
        size, box = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:  # of 64 bits, behind the name
            size = int.from_bytes(head[8:16], "big")
        if at and box == b"ftyp":
            raise BadExample(
                f"{file.path}: not audio that can be read: several MP4 files were joined end to "
                f"end (the second begins at byte {at}): write the clip anew",
                "not audio",
            )
        if box == b"mdat":
            check_whole(file.path, file.size - at, size, "bytes of sound")
        if size < 8:  # 0: to the end of the file
            return
        at += size


def _buffered(view: io.RawIOBase | io.BytesIO) -> io.BufferedReader | io.BytesIO:
    return view if isinstance(view, io.BytesIO) else io.BufferedReader(view)


def _stream(container: InputContainer, path: str, kind: str) -> AudioStream:
    if not container.streams.audio:
        raise BadExample(
            f"{path}: {kind}: not audio that can be read (it holds no sound)", "not audio"
        )
    stream = container.streams.audio[0]
    if not stream.rate:
        raise BadExample(
            f"{path}: {kind}: not audio that can be read (it names no sample rate)", "not audio"
        )
    return stream


def _decode(av: ModuleType, file: File, kind: str, rate: int, most: float) -> list[Piece]:
    blocks = list(_blocks(av, file, kind, most)) or [np.zeros((0, 1), np.float32)]
    return [(np.ascontiguousarray(np.concatenate(blocks), np.float32), rate)]


def _blocks(av: ModuleType, file: File, kind: str, most: float) -> Iterator[np.ndarray]:
    """Samples [samples, channels] at the stream's own rate, until there are more than `most`.

    Raises BadExample where they end long before the header says.
    """
    view, count, end = file.view(), 0, 0.0
    with decoding(file.path), av.open(_buffered(view)) as container:
        stream = _stream(container, file.path, kind)
        # Planar float, whatever the codec gives.
        resampler = av.AudioResampler("fltp", stream.layout, stream.rate)
        promised = _promised(container, stream)
        for frame in chain(container.decode(stream), [None]):
            if frame is not None and frame.time is not None:  # there may be gaps between frames
                end = max(end, frame.time + frame.samples / stream.rate)
            for converted in resampler.resample(frame):
                count += converted.samples
                yield converted.to_ndarray().T
            if count > most:
                return
        if promised is not None:
            there = max(end, count / stream.rate)
            check_whole(file.path, there * stream.rate, promised * stream.rate, "samples")


def _promised(container: InputContainer, stream: AudioStream) -> float | None:
    """Seconds that the header says the sound goes on for; None: it does not say."""
    if not container.format.name.startswith(_PROMISING):
        return None
    told = []
    if stream.duration is not None and stream.time_base is not None:
        told.append(float(stream.duration * stream.time_base))
    noted = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d*)?)", stream.metadata.get("DURATION", ""))
    if noted is not None:  # Matroska's, of one stream
        told.append(int(noted[1]) * 3600 + int(noted[2]) * 60 + float(noted[3]))
    # Pictures may go on for longer than sound: then the whole file's says nothing about it.
    if container.duration is not None and (told or len(container.streams) == 1):
        told.append(container.duration / 1e6)
    return min(told, default=None)
