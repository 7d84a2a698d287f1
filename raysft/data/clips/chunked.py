"""Files made of chunks, or with one header before the samples: the samples' size is written down.

WAV (RIFF, RIFX, RF64, BW64), Wave64, AIFF and AIFF-C, AU, NIST Sphere, CAF. libsndfile takes as
many samples as are there, whatever the header promises; so the header is read here as well, and a
file that ends early is told from one whose writer could not go back to write the size (a pipe, a
recorder that was killed): such a size is 0 or at the very end of its range, and promises nothing.
Costs a few reads of 4 kB, most often one.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from raysft.data.clips import mp3
from raysft.data.clips.file import (
    ENDLESS,
    File,
    Piece,
    Track,
    check_whole,
    read,
    read_part,
    sound,
)
from raysft.errors import BadExample

# Formats of WAV, by their tags in the registry of Microsoft.
_MPEG_TAGS = (0x50, 0x55)
_MS_ADPCM, _IMA_ADPCM, _GSM = 0x02, 0x11, 0x31
_IN_BLOCKS = (_MS_ADPCM, _IMA_ADPCM, _GSM)
_EXTENSIBLE = 0xFFFE
# The ends of the GUIDs that an extensible header names its format by: WAV's, and ambisonics'.
_SUBFORMATS = (
    bytes.fromhex("000010008000 00aa00389b71"),
    bytes.fromhex("2107d3118644c8c1ca000000"),
)
_AS_THEY_ARE = re.compile("PCM_|FLOAT|DOUBLE|[AU]LAW")  # samples that depend on no others
_STEPS = 89  # of IMA ADPCM: a block begins with the number of one
_BEHIND_SHARE = 0.02  # of the samples a header promises that more than it promises may follow
_MOST_CHUNKS = 10_000
_FILES = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"riff", b"FORM", b"caff")  # no chunks of a file


def streamed(size: int) -> bool:
    """Whether a size of 32 bits is what programs write that do not know it: 0, or at the end of
    the range of 31 or 32 bits (sox 0x7F000000 and 0x7FFFF000, ffmpeg 0xFFFFFFFF)."""
    return size == 0 or 0x7F000000 <= size <= 0x80000100 or size >= 0xFFFF0000


_W64 = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # the end of the GUIDs of Wave64's own chunks
_W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")


@dataclass(frozen=True)
class Samples:
    """Where a file's samples are. size: their bytes, as the header promises.

    patches: what the header would be with the size that is there; {} where it promises one.
    last: nothing that matters lies behind them. format: of WAV and its kin, else None.
    """

    offset: int
    size: int
    patches: dict[int, bytes]
    last: bool = False
    format: Format | None = None


@dataclass(frozen=True)
class Format:
    """The chunk `fmt ` of a WAV. block: bytes of the samples that are coded together, of all
    channels; per_block: how many of a channel those are, where they are coded (else 0)."""

    tag: int
    channels: int
    block: int
    per_block: int

    @classmethod
    def of(cls, chunk: bytes, end: str) -> Format | None:
        """None where it makes no sense."""
        if len(chunk) < 16:
            return None
        tag, channels, _, _, block, bits = struct.unpack(end + "HHIIHH", chunk[:16])
        if tag == _EXTENSIBLE:
            if len(chunk) < 40 or chunk[28:40] not in _SUBFORMATS:
                return None
            more, used = struct.unpack(end + "HH", chunk[16:20])
            if more < 22 or not bits // 2 < used <= bits:
                return None
            (tag,) = struct.unpack(end + "H", chunk[24:26])
        if not channels or not block:
            return None
        per_block = 0
        if tag in _IN_BLOCKS:
            own, per_block = block // channels, int(tag == _GSM and block == 65) * 320
            if tag == _MS_ADPCM:
                per_block = 2 * (own - 7) + 2
            elif tag == _IMA_ADPCM:
                per_block = 2 * (own - 4) + 1
            if per_block <= 0 or struct.pack(end + "H", per_block) != chunk[18:20]:
                return None
        return cls(tag, channels, block, per_block)


def track(file: File, find: Callable[[File], Samples | None]) -> Track:
    """find: where the samples of this format are; None: nowhere. Raises BadExample."""
    plain = _plain(file) if find is riff else None
    return plain or _asked(file, find)


_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")


def _plain(file: File) -> Track | None:
    """A WAV whose header is the usual 44 bytes before integer samples, and that is these samples
    to its end: libsndfile could say no more of it, and takes twice as long. None: it is another.
    """
    header = file.read(0, _HEADER.size)
    if len(header) < _HEADER.size:
        return None
    name, total, _, first, width, *form, second, size = _HEADER.unpack(header)
    tag, channels, rate, speed, block, bits = form
    if (name, first, width, tag, second) != (b"RIFF", b"fmt ", 16, 1, b"data"):
        return None
    whole = file.size == _HEADER.size + size == total + 8 and not streamed(size)
    counted = 1 <= channels <= 8 and bits in (8, 16, 24, 32) and block == channels * bits // 8
    if not (whole and counted and 0 < rate < 1 << 20 and speed == rate * block):
        return None
    if size % 2 or size % block:
        return None
    later = _Later(file)
    return Track(rate, size // block, later.decode, later.close, channels=channels, part=later.part)


class _Later:
    """A WAV that libsndfile opens once it is to be decoded."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._opened: Track | None = None

    def _track(self) -> Track:
        if self._opened is None:
            self._opened = _asked(self._file, riff)
        return self._opened

    def decode(self, most: float) -> list[Piece]:
        """As `Track.decode`."""
        return self._track().decode(most)

    def part(self, first: int, last: int) -> np.ndarray:
        """As `Track.part`: integers can be entered anywhere."""
        part = self._track().part
        assert part is not None
        return part(first, last)

    def close(self) -> None:
        """As `Track.close`."""
        if self._opened is not None:
            self._opened.close()


def _asked(file: File, find: Callable[[File], Samples | None]) -> Track:
    """As `track`, of what libsndfile finds there."""
    samples = find(file)
    if samples is None:
        raise BadExample(
            f"{file.path}: not audio that can be read (its header names no samples)", "not audio"
        )
    present = max(0, file.size - samples.offset)
    stop = None
    if not samples.patches:
        check_whole(file.path, present, samples.size, "bytes of samples")
        stop = min(file.size, samples.offset + samples.size)
    form = samples.format
    if form is not None and form.tag in _MPEG_TAGS:
        return mp3.track(file, samples.offset, stop or file.size)

    view = file.view(0, stop if samples.last else None, samples.patches)
    opened = sound(file.path, view)
    rate, count, channels = opened.samplerate, opened.frames, opened.channels
    if count >= ENDLESS or (count == 0 and min(present, samples.size) >= 8 * channels):
        raise BadExample(
            f"{file.path}: its header gives no length: write the clip anew", "not audio"
        )
    if form is not None and form.per_block:  # libsndfile fills the last block up
        size = min(present, samples.size)
        if form.tag == _GSM:  # of which a part cannot be decoded
            size -= size % form.block
        count = min(count, size * form.per_block // form.block)

    def decode(most: float) -> list[Piece]:
        piece = read(file.path, opened, most, count)
        if count <= most:
            check_whole(file.path, len(piece[0]), count, "samples")
        if form is not None and form.tag == _IMA_ADPCM:
            _check_steps(file, samples, form)
        return [piece]

    part = None
    if _AS_THEY_ARE.match(opened.subtype):
        part = partial(read_part, file.path, opened)
    return Track(rate, count, decode, opened.close, channels=channels, part=part)


def _check_steps(file: File, samples: Samples, form: Format) -> None:
    """Raises BadExample where many blocks of IMA ADPCM begin with what cannot be."""
    content = file.read(samples.offset, samples.size)
    steps = [content[2 + 4 * channel :: form.block] for channel in range(form.channels)]
    wrong = sum(step >= _STEPS for channel in steps for step in channel)
    total = sum(map(len, steps))
    check_whole(file.path, total - wrong, total * (1 + _BEHIND_SHARE), "blocks that can be decoded")


def _check_end(file: File, start: int, size: int, behind: int | None = None) -> None:
    """Raises BadExample where more follows the samples than the header promises.

    behind: bytes of it, where other chunks may be there too and are not meant; None: all.
    """
    behind = file.size - start - size if behind is None else behind
    if behind > max(16, size * _BEHIND_SHARE):
        raise BadExample(
            f"{file.path}: not audio that can be read: its header promises {size} bytes of "
            f"samples, but {behind} more follow: write the clip anew",
            "not audio",
        )


def _joined(file: File, size: int) -> BadExample:
    return BadExample(
        f"{file.path}: not audio that can be read: several files were joined end to end (the "
        f"first has {size} bytes of samples): write the clip anew",
        "not audio",
    )


def _check_behind(
    file: File, start: int, size: int, layout: str, even: int, counted: int = 0
) -> None:
    """As `_check_end`, of a format whose samples other chunks may follow.

    What a recorder wrote that was killed before it could write the size anew is no chunk, and a
    second file is none of this one. layout, even: as of `_chunks`; counted: bytes of a chunk's
    header that its size counts.
    """
    stop = start + size
    if file.size <= stop:
        return
    rests = []
    for at in {stop, stop + -size % even}:  # not all programs pad
        for _ in range(_MOST_CHUNKS):
            header = file.read(at, struct.calcsize(layout))
            if header[:4] in _FILES:
                raise _joined(file, size)
            if len(header) < struct.calcsize(layout):
                break
            name, length = struct.unpack(layout, header)
            length -= counted
            content = at + len(header)
            named = len(name) > 4 or re.fullmatch(rb"[\x20-\x7e]{4}", name)
            if not named or length < 0 or content + length > file.size:
                break
            at = content + length + -length % even
        rests.append(max(0, file.size - at))
    _check_end(file, start, size, min(rests))


def riff(file: File) -> Samples | None:
    """WAV, by its chunks: RIFF (little-endian), RIFX (big-endian), RF64 and BW64 (64-bit sizes)."""
    head = file.read(0, 12)
    end = ">" if head[:4] == b"RIFX" else "<"
    long_size, long_at, form = None, 0, None
    for name, at, size in _chunks(file, 12, end + "4sI", 2):
        if name == b"ds64" and head[2:4] == b"64":
            long_at = at + 8
            long_size = int.from_bytes(file.read(long_at, 8), "little")
        elif name == b"fmt ":
            form = Format.of(file.read(at, min(size, 40)), end)
        elif name == b"data" and (form is None or (long_size is None and head[2:4] == b"64")):
            return None
        elif name == b"data":
            there = file.size - at
            if streamed(size) and re.match(b"R(IF[FX]|F64)....WAVE", file.read(at, 12), re.DOTALL):
                raise _joined(file, 0)
            if size == 0xFFFFFFFF and long_size is not None:
                if 0 < long_size < 1 << 62:
                    _check_behind(file, at, long_size, end + "4sI", 2)
                    return Samples(at, long_size, {}, True, form)
                return Samples(at, there, {long_at: struct.pack("<Q", there)}, True, form)
            if streamed(size) and not (size == 0 and _chunks_follow(file, at, end)):
                filled = struct.pack(end + "I", min(there, 0xFFFFFFFF))
                return Samples(at, there, {at - 4: filled}, True, form)
            _check_behind(file, at, size, end + "4sI", 2)
            return Samples(at, size, {}, True, form)
    return None


def _chunks_follow(file: File, at: int, end: str) -> bool:
    """Whether the rest of a file is chunks: what is before them is empty then, as it says."""
    stop = at
    for name, start, size in _chunks(file, at, end + "4sI", 2):
        if not re.fullmatch(rb"[\x20-\x7e]{4}", name):
            return False
        stop = start + size + size % 2
    return file.size - 1 <= stop <= file.size + 1


def wave64(file: File) -> Samples | None:
    """Wave64: names of 16 bytes, sizes of 8 that count name and size, padded to 8."""
    head = file.read(0, 40)  # riff's GUID, the size of the file, wave's GUID
    if head[:16] != _W64_RIFF or head[24:] != b"wave" + _W64:
        return None
    at, form = 40, None
    for _ in range(_MOST_CHUNKS):
        header = file.read(at, 24)
        size = int.from_bytes(header[16:], "little")
        if len(header) < 24 or not 24 <= size < 1 << 62:
            return None
        if header[4:16] == _W64 and header[:4] == b"fmt ":
            form = Format.of(file.read(at + 24, min(size - 24, 40)), "<")
        if header[4:16] == _W64 and header[:4] == b"data":
            _check_behind(file, at + 24, size - 24, "<16sQ", 8, counted=24)
            return None if form is None else Samples(at + 24, size - 24, {}, True, form)
        at += -(-size // 8) * 8
    return None


def aiff(file: File) -> Samples | None:
    """AIFF and AIFF-C: the chunk SSND, which begins with an offset and a block size."""
    for name, at, size in _chunks(file, 12, ">4sI", 2):
        if name == b"COMM" and not _whole_rate(file.read(at + 8, 10)):
            return None
        if name == b"SSND":
            start = at + 8 + int.from_bytes(file.read(at, 4), "big")
            if not streamed(size):
                _check_behind(file, at, size, ">4sI", 2)
                return Samples(start, max(0, at + size - start), {})
            filled = struct.pack(">I", min(file.size - at, 0xFFFFFFFF))
            return Samples(start, file.size - start, {at - 4: filled})
    return None


def _whole_rate(data: bytes) -> bool:
    """Whether these 10 bytes, a number with 64 bits of fraction, are a whole number of Hz."""
    exponent, mantissa = int.from_bytes(data[:2], "big") - 16383, int.from_bytes(data[2:], "big")
    return 0 <= exponent < 32 and mantissa & (1 << 63 - exponent) - 1 == 0


def au(file: File) -> Samples | None:
    """AU (.snd), of either byte order: one header of fixed fields."""
    head = file.read(0, 24)
    if len(head) < 24:
        return None
    end = ">" if head[:4] == b".snd" else "<"
    start, size = struct.unpack(end + "II", head[4:12])
    if start < 24:
        return None
    if not streamed(size):
        _check_end(file, start, size)
        return Samples(start, size, {}, True)
    return Samples(start, file.size - start, {8: b"\xff" * 4}, True)


def sphere(file: File) -> Samples | None:
    """NIST Sphere: lines `name -type value` in the first 1024 bytes or more."""
    length = re.match(rb"NIST_1A\n\s*(\d+)\n", file.read(0, 32))
    if length is None:
        return None
    start = int(length[1])
    header = file.read(0, min(start, 1 << 16))
    fields = dict(re.findall(rb"^(\w+) -i (\d+)", header, re.MULTILINE))
    names = (b"sample_count", b"channel_count", b"sample_n_bytes")
    counts = [int(fields.get(name, 0)) for name in names]
    if not all(counts) or not re.search(rb"^end_head$", header, re.MULTILINE):
        return None
    size = counts[0] * counts[1] * counts[2]
    _check_end(file, start, size)
    return Samples(start, size, {}, True)


def caf(file: File) -> Samples | None:
    """Apple's Core Audio Format: chunks of 64-bit sizes; that of `data` may be -1, to the end."""
    for name, at, size in _chunks(file, 8, ">4sQ", 1):
        if name == b"desc" and size >= 32:
            code, _, packet, frames, channels, bits = struct.unpack(
                ">4sIIIII", file.read(at + 8, 24)
            )
            if code == b"lpcm" and (frames != 1 or 8 * packet != channels * bits):
                return None
        if name == b"data":
            if size < 1 << 62:
                _check_behind(file, at, size, ">4sQ", 1)
                return Samples(at + 4, size - 4, {})
            there = file.size - at
            return Samples(at + 4, there - 4, {at - 8: struct.pack(">Q", there)})
    return None


def _chunks(file: File, at: int, layout: str, even: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its content begins, its size) of each chunk from `at` on.

    layout: of a chunk's header. even: what sizes are rounded up to.
    """
    width = struct.calcsize(layout)
    buffered_at, buffer = at, file.read(at, 4096)
    for _ in range(_MOST_CHUNKS):
        if not buffered_at <= at <= buffered_at + len(buffer) - width:
            buffered_at, buffer = at, file.read(at, 4096)
        header = buffer[at - buffered_at : at - buffered_at + width]
        if len(header) < width:
            return
        name, size = struct.unpack(layout, header)
        yield name, at + width, size
        at += width + -(-size // even) * even
