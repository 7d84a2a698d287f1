"""MPEG audio (MP3, also layers I and II): its frames, one after the other.

A frame says how long it is, and nothing says how many there are but a note that most encoders
leave in the first (Xing, Info): frames and bytes. Where its bytes are those of the file, it is
believed. Else (no note, joined files, something behind the audio, a wrong note) the frames are
counted: 0.1 ms a second of audio, and the file is read whole. libsndfile would guess the length
from the first frame's bit rate, and stop there.

What is decoded then is the frames alone: tags, pictures and junk between and behind them are left
out, and the count is written into the first frame, where libsndfile looks for it. Runs of frames
of another rate or channel count (joined files) are decoded one after the other. ISO 11172-3, 2.4.
"""

from __future__ import annotations

import io
import math
import re
import struct
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from raysft.data.clips.file import (
    File,
    Piece,
    Sound,
    Track,
    check_whole,
    read,
    resampled_length,
    sound,
)
from raysft.errors import BadExample

_LEADING = 1 << 16  # bytes that may lie before the first frame, tags not counted
_SYNC = re.compile(rb"\xff[\xe2-\xff]", re.DOTALL)
_KBITS = {  # by (MPEG 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44100, 48000, 32000)
_DECODER_DELAY = 529  # samples a decoder is late by, which the note's delay leaves out


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame's header. kind: frames of one kind make one stream."""

    size: int
    samples: int
    rate: int
    mono: bool
    kind: tuple[int, int, int, bool]

    @property
    def note_at(self) -> int:
        """Where in the frame an encoder leaves its note: behind the side information (layer 3)."""
        if self.kind[0] == 3:
            return 4 + (17 if self.mono else 32)
        return 4 + (9 if self.mono else 17)


@dataclass
class _Run:
    """Frames of a kind, one after the other. places: (where, size) of each in the file.

    note: what the encoder left in front of them.
    """

    frame: _Frame
    places: list[tuple[int, int]]
    note: _Note

    @property
    def parts(self) -> list[slice]:
        """Of the samples decoded, those that are sound: without the encoder's delay, and without
        its padding at the end of the file it was (others may have been joined to it)."""
        count, end = len(self.places) * self.frame.samples, self.note.frames * self.frame.samples
        delay = min(self.note.delay, count)
        if not delay < end <= count:
            return [slice(delay, count)]
        return [slice(delay, max(delay, end - self.note.padding)), slice(end, count)]

    @property
    def samples(self) -> int:
        return sum(part.stop - part.start for part in self.parts)


def track(file: File, start: int, stop: int) -> Track:
    """start, stop: where in the file the audio is. Raises BadExample where there is none."""
    start = after_tags(file, start)
    stop = _before_tags(file, start, stop)
    first = _first(file, start, stop)
    note = _note(file, first[0], first[1]) if first is not None else None
    if first is not None and note is not None and note.frames and note.bytes:
        present = stop - first[0]
        check_whole(file.path, present, note.bytes, "bytes of frames")
        if abs(present - note.bytes) <= note.bytes // 100:
            opened = sound(file.path, file.view(first[0], stop))
            rate, count = opened.samplerate, opened.frames
            expected = note.frames * first[1].samples - note.delay - note.padding
            if rate == first[1].rate and abs(count - expected) <= 2 * first[1].samples:
                believed = partial(_believed, file, opened, first[0], stop, note)
                return Track(rate, count, believed, opened.close, channels=opened.channels)
            opened.close()
    runs = _runs(file.read(start, stop - start))
    if not runs:
        raise BadExample(
            f"{file.path}: not audio that can be read (an MP3 without a frame)", "not audio"
        )
    rate = runs[0].frame.rate
    total = sum(resampled_length(run.samples, run.frame.rate, rate) for run in runs)

    mono = {run.frame.mono for run in runs}
    channels = None if len(mono) > 1 else 1 if mono.pop() else 2
    return Track(rate, total, lambda most: _decode(file, start, stop), channels=channels)


def first_frame(data: bytes) -> bool:
    """Whether an MPEG frame begins here."""
    return _header(data[:4]) is not None


def _believed(
    file: File, opened: Sound, start: int, stop: int, note: _Note, most: float
) -> list[Piece]:
    """A file whose note is believed, unless its frames are not as many as it says."""
    if sum(len(run.places) for run in _runs(file.read(start, stop - start))) != note.frames:
        return _decode(file, start, stop)
    piece = read(file.path, opened, most, opened.frames)
    if opened.frames <= most:
        check_whole(file.path, len(piece[0]), opened.frames, "samples")
    return [piece]


def _decode(file: File, start: int, stop: int) -> list[Piece]:
    content = file.read(start, stop - start)
    return [_decode_run(file.path, content, run) for run in _runs(content)]


def _decode_run(path: str, content: bytes, run: _Run) -> Piece:
    """A run's frames, with their count in front where libsndfile looks for it."""
    frames = b"".join(content[at : at + size] for at, size in run.places)
    before, count = 0, len(run.places) * run.frame.samples
    if run.frame.kind[1] == 3:
        at, _ = run.places[0]
        frames = _with_count(path, content[at : at + 4], run, len(frames)) + frames
        before = run.frame.samples - _DECODER_DELAY
    else:  # no note in these layers: libsndfile divides bytes by the first frame's size
        size = run.places[0][1]
        at, last = run.places[-1]
        missing = len(run.places) * (size + 1) - len(frames)
        frames += content[at : at + last] * (missing // last + 2)
    with sound(path, io.BytesIO(frames)) as opened:
        samples, rate = read(path, opened, math.inf, before + count)
    check_whole(path, len(samples) - before, count, "samples")
    samples = samples[before:]
    return np.concatenate([samples[part] for part in run.parts]), rate


def _with_count(path: str, header: bytes, run: _Run, size: int) -> bytes:
    """A frame like the run's with a note of how many follow, and one of silence.

    Of a file with a note libsndfile leaves out the first 529 samples, the decoder's own delay: the
    silence is there for it.
    """
    for index in range(1, 15):  # of the smallest bit rate that has room for it
        bits = bytes([header[0], header[1] | 1, index << 4 | header[2] & 0x0C, header[3]])
        frame = _header(bits)
        if frame is not None and frame.size >= frame.note_at + 140:
            counts = struct.pack(">III", 3, len(run.places) + 1, size + 2 * frame.size)
            note = bits + bytes(frame.note_at - 4) + b"Xing" + counts
            return note.ljust(frame.size, b"\0") + bits.ljust(frame.size, b"\0")
    raise BadExample(
        f"{path}: not audio that can be read (an MP3 of an odd rate): convert it", "not audio"
    )


def _runs(content: bytes) -> list[_Run]:
    """All frames, by kind; encoders' notes in front of a file are left out."""
    runs: list[_Run] = []
    at, synchronous = 0, False
    first = True
    while True:
        frame = _header(content[at : at + 4]) if synchronous else None
        if frame is None or at + frame.size > len(content):
            found = _next(content, at, limit=first)
            if found is None:
                break
            at, frame = found
            synchronous = True
        if first:
            note = _note_of(content[at : at + frame.size], frame)
            first = False
            if note is not None:
                runs.append(_Run(frame, [], note))
                at += frame.size
                continue
        if not runs or runs[-1].frame.kind != frame.kind:
            runs.append(_Run(frame, [], _Note()))
        runs[-1].places.append((at, frame.size))
        at += frame.size
    return [run for run in runs if len(run.places) > 1]


def _next(content: bytes, at: int, limit: bool) -> tuple[int, _Frame] | None:
    """The next frame from `at` on that another one of its kind, or the end, follows."""
    begin = _header(content[at : at + 4]) if limit else None
    if begin is not None and _note_of(content[at : at + begin.size], begin) is not None:
        return at, begin  # whatever follows
    end = len(content) if not limit else min(len(content), at + _LEADING)
    for found in _SYNC.finditer(content, at, end):
        place = found.start()
        frame = _header(content[place : place + 4])
        if frame is None:
            continue
        after = place + frame.size
        following = _header(content[after : after + 4])
        if after == len(content) or (following is not None and following.kind == frame.kind):
            return place, frame
    return None


def _first(file: File, start: int, stop: int) -> tuple[int, _Frame] | None:
    content = file.read(start, min(stop - start, 1 << 13))
    found = _next(content, 0, limit=True)
    return None if found is None else (start + found[0], found[1])


@lru_cache(maxsize=4096)
def _header(data: bytes) -> _Frame | None:
    """What four bytes say, where they are the header of a frame. Free bit rates are not known."""
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return None
    version, layer = data[1] >> 3 & 3, 4 - (data[1] >> 1 & 3)
    bit_rate, rate = data[2] >> 4, data[2] >> 2 & 3
    if version == 1 or layer == 4 or bit_rate in (0, 15) or rate == 3 or data[3] & 3 == 2:
        return None
    hertz = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kbits = _KBITS[version == 3, layer][bit_rate - 1]
    padding = data[2] >> 1 & 1
    mono = data[3] >> 6 == 3
    if layer == 1:
        size, samples = (12000 * kbits // hertz + padding) * 4, 384
    else:
        samples = 576 if layer == 3 and version != 3 else 1152
        size = samples // 8 * 1000 * kbits // hertz + padding
    return _Frame(size, samples, hertz, mono, (version, layer, hertz, mono))


@dataclass(frozen=True)
class _Note:
    """What an encoder left in the first frame. delay, padding: samples at the ends to leave out."""

    frames: int = 0
    bytes: int = 0
    delay: int = 0
    padding: int = 0


def _note(file: File, at: int, frame: _Frame) -> _Note | None:
    return _note_of(file.read(at, frame.size), frame)


def _note_of(data: bytes, frame: _Frame) -> _Note | None:
    """The note in a frame; None: it is one of sound."""
    if frame.kind[1] != 3:
        return None
    if data[36:40] == b"VBRI":
        return _Note()
    at = frame.note_at
    if data[at : at + 4] not in (b"Xing", b"Info"):
        return None
    flags = int.from_bytes(data[at + 4 : at + 8], "big")
    at += 8
    counts = [0, 0]
    for number, flag in enumerate((1, 2)):
        if flags & flag:
            counts[number] = int.from_bytes(data[at : at + 4], "big")
            at += 4
    at += (100 if flags & 4 else 0) + (4 if flags & 8 else 0)
    delays = int.from_bytes(data[at + 21 : at + 24], "big")
    if not data[at : at + 4].strip(b"\0") or not delays:
        return _Note(counts[0], counts[1])
    delay, padding = (delays >> 12) + _DECODER_DELAY, max(0, (delays & 0xFFF) - _DECODER_DELAY)
    return _Note(counts[0], counts[1], delay, padding)


def after_tags(file: File, start: int) -> int:
    """Where the ID3v2 tags end: several may follow each other."""
    while True:
        head = file.read(start, 10)
        if head[:3] != b"ID3" or len(head) < 10 or max(head[6:10]) > 127:
            return start
        size = 0
        for byte in head[6:10]:
            size = size << 7 | byte
        start += 10 + size + (10 if head[5] & 16 else 0)


def _before_tags(file: File, start: int, stop: int) -> int:
    """Where the tags begin that lie behind the audio: ID3v1, APE."""
    if stop - start >= 128 and file.read(stop - 128, 3) == b"TAG":
        stop -= 128
    footer = file.read(stop - 32, 32) if stop - start >= 32 else b""
    if footer[:8] == b"APETAGEX":
        size = int.from_bytes(footer[12:16], "little")
        size += 32 if footer[23] & 0x80 else 0
        stop = max(start, stop - size)
    return stop
