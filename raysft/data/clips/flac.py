"""FLAC: the length in its header (STREAMINFO), held against its last frame.

The header's total is written last, by going back: a stream has 0 there, and what was joined or cut
by other programs has a wrong one. Each frame says where it stands, so the last one tells how long
the file is; where the two agree, or the header has 0, that is the length. Else, or where something
lies behind the last frame, only decoding tells. Costs two reads, of 4 kB and up to 64 kB.

Files joined end to end (`cat a.flac b.flac`) are decoded one after the other. Where the last is as
long as the first, or no header tells a length, they look like one: a file that is small, or large
for its length, or without one in its header, is gone through for a second beginning.
RFC 9639, sections 8.2 and 9.1.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from functools import partial

import numpy as np

from raysft.data.clips.file import File, Piece, Track, check_whole, read, read_part, sound
from raysft.errors import BadExample

_TAIL = 1 << 16  # bytes in which the last frame is looked for, where the header names no largest
_MOST_TAIL = 1 << 21
_WHOLE = 1 << 17  # bytes up to which a file is gone through whatever it says
_LARGE_SHARE = 0.6  # of the bytes that its samples take uncompressed: few files have more
_SCAN = 1 << 20  # bytes gone through at once
# A file's beginning: the marker, and a STREAMINFO of 34 bytes, the last block or not.
_BEGIN = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22", re.DOTALL)
_SIZES = {1: 192, **{n: 576 << n - 2 for n in range(2, 6)}}
_SIZES |= {n: 256 << n - 8 for n in range(8, 16)}
_RATES = (88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000)
_BITS = {1: 8, 2: 12, 4: 16, 5: 20, 6: 24, 7: 32}


@dataclass(frozen=True)
class _Info:
    """STREAMINFO. total: samples of a channel; 0: not known. at: where in the file it begins."""

    at: int
    block: int
    largest_block: int
    largest_frame: int
    rate: int
    channels: int
    bits: int
    total: int

    @classmethod
    def of(cls, data: bytes | bytearray, at: int) -> _Info:
        numbers = int.from_bytes(data[10:18], "big")
        return cls(
            at,
            int.from_bytes(data[:2], "big"),
            int.from_bytes(data[2:4], "big"),
            int.from_bytes(data[7:10], "big"),
            numbers >> 44,
            (numbers >> 41 & 7) + 1,
            (numbers >> 36 & 31) + 1,
            numbers & (1 << 36) - 1,
        )


def track(file: File, start: int) -> Track:
    """start: where `fLaC` is. Raises BadExample."""
    size = file.size - start
    whole = file.read(start, size) if size <= _WHOLE else b""
    data = whole[:42] or file.read(start, 42)
    if len(data) < 42 or not _BEGIN.match(data):
        raise BadExample(
            f"{file.path}: not audio that can be read (a FLAC without a header)", "not audio"
        )
    info = _Info.of(data[8:], start + 8)
    if not info.rate or not 16 <= info.block <= info.largest_block:
        raise BadExample(
            f"{file.path}: not audio that can be read (a FLAC with a damaged header)", "not audio"
        )
    width = _tail_of(info, size)
    tail = whole[size - width :] or file.read(file.size - width, width)
    end = _last_frame_ends(file.path, info, tail)
    certain = end is not None and info.total in (0, end)
    if (
        end is not None
        and certain
        and _may_be_joined(file, info, start, end)
        and (_BEGIN.search(whole, 8) if whole else _joined(file, start))
    ):
        certain = False
    part = partial(_part, file, info) if certain and info.total else None
    decode = partial(_decode, file, info, end)
    return Track(info.rate, end if certain else None, decode, channels=info.channels, part=part)


def _part(file: File, info: _Info, first: int, last: int) -> np.ndarray:
    """Samples [first, last) of a file that is one, and as long as its header says."""
    with sound(file.path, file.view(info.at - 8)) as opened:
        return read_part(file.path, opened, first, last)


def _may_be_joined(file: File, info: _Info, start: int, samples: int) -> bool:
    """Whether a file of so many samples by its first header and its last frame could be several."""
    size = file.size - start
    frames = samples // info.block + 1
    return (
        file.held
        or size <= _WHOLE
        or info.total == 0
        or size > _LARGE_SHARE * samples * info.channels * info.bits / 8
        or 0 < frames * info.largest_frame < size
    )


def _joined(file: File, start: int) -> bool:
    """Whether a file begins anew behind its first header."""
    return any(_BEGIN.search(file.read(at, _SCAN + 6)) for at in range(start + 8, file.size, _SCAN))


def _decode(file: File, info: _Info, last: int | None, most: float) -> list[Piece]:
    """All files that were joined, each to its end. last: where the last frame of all ends."""
    content = file.read(info.at - 8, file.size)
    starts = [found.start() for found in _BEGIN.finditer(content)]
    pieces = []
    for start, stop in zip(starts, [*starts[1:], len(content)]):
        piece = bytearray(content[start:stop])
        info = _Info.of(piece[8:42], 8)
        end = last
        if stop < len(content):
            end = _last_frame_ends(file.path, info, bytes(piece[-_tail_of(info, len(piece)) :]))
        # libsndfile stops at the total, before whatever follows; at 0 it reads as far as it can.
        piece[21] = piece[21] & 0xF0 | (end or 0) >> 32
        piece[22:26] = struct.pack(">I", (end or 0) & 0xFFFFFFFF)
        with sound(file.path, io.BytesIO(piece)) as opened:
            decoded = read(file.path, opened, most, end)
        if len(decoded[0]) <= most:
            check_whole(file.path, len(decoded[0]), max(info.total, end or 0), "samples")
        pieces.append(decoded)
    return pieces


def _tail_of(info: _Info, size: int) -> int:
    """Bytes at the end of a file in which its last frame begins, as a rule."""
    return min(max(info.largest_frame + 1024, _TAIL), _MOST_TAIL, size - 42)


def _last_frame_ends(path: str, info: _Info, tail: bytes) -> int | None:
    """Samples up to the end of the last frame that begins in `tail`; None: none is found.

    Sound can look like a frame's header, once in 10^9 bytes: one is believed that ends where the
    file does by STREAMINFO, or that follows the one before it.
    """
    found: list[_Frame] = []
    at = len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        frame = _frame(tail[at : at + 16], info)
        if frame is None:
            continue
        found.append(frame)
        if frame.end == info.total or frame.start == 0:
            break
    starts = {frame.end for frame in found} | {0}
    last = next((f for f in found if f.end == info.total or f.start in starts), None)
    if found and last is None:
        raise BadExample(
            f"{path}: not audio that can be read: its frames do not follow each other as its "
            "header says",
            "not audio",
        )
    if last is not None and last.rate not in (0, info.rate):
        raise BadExample(
            f"{path}: not audio that can be read: its header says {info.rate} Hz, its last frame "
            f"{last.rate} Hz",
            "not audio",
        )
    return None if last is None else last.end


@dataclass(frozen=True)
class _Frame:
    """A frame's header. rate: Hz; 0: that of STREAMINFO. start: the first of its samples."""

    rate: int
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


def _frame(header: bytes, info: _Info) -> _Frame | None:
    """The frame that begins with these bytes, 16 at most; None: none of this file does."""
    if len(header) < 6 or header[1] & 0xFE != 0xF8:
        return None
    size, rate = header[2] >> 4, header[2] & 15
    channels, bits = header[3] >> 4, header[3] >> 1 & 7
    if not size or rate == 15 or header[3] & 1 or channels > 10:
        return None
    if (channels + 1 if channels < 8 else 2) != info.channels:
        return None
    if bits and _BITS.get(bits) != info.bits:
        return None
    number, at = header[4], 5
    if number >= 0x80:  # coded as UTF-8 is: as many bytes as there are leading ones, 2 to 7
        length = 8 - (number ^ 0xFF).bit_length()
        if not 2 <= length <= 7:
            return None
        number &= 0x7F >> length
        for byte in header[at : at + length - 1]:
            if byte & 0xC0 != 0x80:
                return None
            number = number << 6 | byte & 0x3F
        at += length - 1
    if size in (6, 7):
        count = int.from_bytes(header[at : at + size - 5], "big") + 1
        at += size - 5
    else:
        count = _SIZES[size]
    if rate in (12, 13, 14):  # in kHz, Hz, tens of Hz
        width, unit = {12: (1, 1000), 13: (2, 1), 14: (2, 10)}[rate]
        hertz = int.from_bytes(header[at : at + width], "big") * unit
        at += width
    else:
        hertz = _RATES[rate - 1] if rate else 0
    if at >= len(header) or _crc8(header[:at]) != header[at]:
        return None
    return _Frame(hertz, number if header[1] & 1 else number * info.block, count)


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value = _CRC8[value ^ byte]
    return value


def _table() -> list[int]:
    """Of the polynomial x^8 + x^2 + x + 1."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value << 1) ^ (0x107 if value & 0x80 else 0)
        table.append(value)
    return table


_CRC8 = _table()
