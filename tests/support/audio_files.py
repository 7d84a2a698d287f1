"""Audio files of every container, damaged in every way: what the fuzz of the readers reads."""

from __future__ import annotations

import io
import struct
import subprocess
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import soundfile

SECONDS = 1.3

# Name -> (rate, format, subtype) as libsndfile writes them.
KINDS: dict[str, tuple[int, str, str]] = {
    "wav": (16000, "WAV", "PCM_16"),
    "wavex": (16000, "WAVEX", "PCM_24"),
    "adpcm.wav": (16000, "WAV", "IMA_ADPCM"),
    "gsm.wav": (8000, "WAV", "GSM610"),
    "g721.au": (8000, "AU", "G721_32"),
    "rf64": (16000, "RF64", "PCM_16"),
    "w64": (16000, "W64", "PCM_16"),
    "aiff": (16000, "AIFF", "PCM_16"),
    "au": (16000, "AU", "PCM_16"),
    "sph": (16000, "NIST", "PCM_16"),
    "caf": (16000, "CAF", "PCM_16"),
    "flac": (16000, "FLAC", "PCM_16"),
    "ogg": (16000, "OGG", "VORBIS"),
    "opus": (16000, "OGG", "OPUS"),
    "mp3": (16000, "MP3", "MPEG_LAYER_III"),
}


def speech(rate: int, seconds: float = SECONDS, seed: int = 0) -> np.ndarray:
    """A buzz that comes and goes over noise: float64 [samples]."""
    time = np.arange(round(rate * seconds)) / rate
    buzz = sum(np.sin(2 * np.pi * 130 * k * time) / k for k in range(1, 12))
    noise = np.random.default_rng(seed).normal(0, 0.01, len(time))
    return 0.15 * buzz * np.clip(np.sin(7 * time + seed), 0, 1) + noise


@lru_cache(maxsize=200)
def encoded(kind: str, seed: int = 0, channels: int = 1, seconds: float | None = None) -> bytes:
    """A whole file of a kind. MP3 is longer: what encoders add at its ends is less than 2% then."""
    rate, container, subtype = KINDS[kind]
    seconds = seconds or (8.0 if kind == "mp3" else SECONDS)
    wave = speech(rate, seconds, seed)
    if channels == 2:
        wave = np.stack([wave, 0.7 * wave], axis=1)
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=container, subtype=subtype)
    return out.getvalue()


def ffmpeg(*arguments: object) -> bytes:
    """What ffmpeg writes to its output. The binary is that of imageio-ffmpeg."""
    binary = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    command = [binary, "-nostdin", "-loglevel", "quiet", "-y", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=60).stdout


def ffmpeg_samples(path: str, rate: int, samples: bool = False):
    """How many samples of a channel ffmpeg decodes of a clip, or the samples, mixed to one: float32
    at `rate`. A clip that it cannot read has none."""
    mono = ("-ac", 1) if samples else ("-af", "pan=mono|c0=c0")  # of any number of channels
    command = ("-t", "90", "-i", path, "-map", "0:a:0", *mono, "-ar", rate, "-f", "f32le", "-")
    decoded = np.frombuffer(ffmpeg(*command), np.float32)
    return decoded if samples else len(decoded)


def _flip(data: bytearray, rng: np.random.Generator, most: int) -> bytearray:
    for _ in range(rng.integers(1, 5)):
        at = rng.integers(0, min(len(data), most))
        data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
    return data


def _sizes(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A number of 2, 4 or 8 bytes in the header becomes another one."""
    width = int(rng.choice([2, 4, 8]))
    at = int(rng.integers(0, 80)) // 2 * 2
    end = str(rng.choice(["<", ">"]))
    code = {2: "H", 4: "I", 8: "Q"}[width]
    (old,) = struct.unpack(end + code, data[at : at + width])
    most = (1 << 8 * width) - 1
    new = [0, most, most >> 1, 1 << 8 * width - 1, 12345 % most][rng.integers(5)]
    if rng.random() < 0.5:
        new = int(min(most, max(0, old * float(rng.choice([0.5, 2.0, 0.97, 1.03, 10.0])))))
    data[at : at + width] = struct.pack(end + code, new)
    return data


def _cut(data: bytearray, rng: np.random.Generator) -> bytearray:
    return data[: int(len(data) * rng.uniform(0.02, 1))]


def _junk(rng: np.random.Generator, size: int) -> bytes:
    which = rng.integers(4)
    if which == 0:
        return bytes(size)
    if which == 1:
        return rng.bytes(size)
    if which == 2:
        return (b"<html>not found</html>\n" * (size // 20 + 1))[:size]
    return b"TAG" + bytes(125)


def _behind(data: bytearray, rng: np.random.Generator) -> bytearray:
    return data + _junk(rng, int(rng.integers(1, 9000)))


def _before(data: bytearray, rng: np.random.Generator) -> bytearray:
    if rng.random() < 0.5:
        size = int(rng.integers(10, 3000))
        head = b"ID3\x04\0\0" + bytes([0, 0, size >> 7, size & 127]) + bytes(size)
        return bytearray(head) + data
    return bytearray(_junk(rng, int(rng.integers(1, 200)))) + data


def _hole(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Bytes in the middle are zeros, noise, gone, or there twice."""
    at = int(rng.integers(0, len(data)))
    size = int(rng.integers(1, 3000))
    which = rng.integers(4)
    if which == 0:
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif which == 1:
        data[at : at + size] = rng.bytes(len(data[at : at + size]))
    elif which == 2:
        del data[at : at + size]
    else:
        data[at:at] = data[at : at + size]
    return data


def damaged(kind: str, seed: int) -> bytes:
    """A file of a kind, damaged in one or two ways; the same for the same seed."""
    rng = np.random.default_rng([seed, *kind.encode()])
    channels = 2 if rng.random() < 0.2 and kind not in ("gsm.wav", "g721.au") else 1
    data = bytearray(encoded(kind, seed % 3, channels))
    ways: list[Callable[[bytearray], bytearray]] = [
        lambda d: _flip(d, rng, 64),
        lambda d: _flip(d, rng, 64),
        lambda d: _flip(d, rng, 1024),
        lambda d: _sizes(d, rng),
        lambda d: _sizes(d, rng),
        lambda d: _sizes(d, rng),
        lambda d: _cut(d, rng),
        lambda d: _behind(d, rng),
        lambda d: _before(d, rng),
        lambda d: _hole(d, rng),
        lambda d: d + encoded(kind, (seed + 1) % 3, channels),
    ]
    for _ in range(1 if rng.random() < 0.75 else 2):
        if len(data) > 100:
            data = ways[rng.integers(len(ways))](data)
    return bytes(data)
