"""Clips on disk -> mono float32 samples at the rate a model wants.

Stands under the index (`probe`: lengths, from headers only) and under the encoders in the data
tasks (`load`: decode, mix, resample). soundfile reads wav, flac, ogg (Vorbis, Opus) and mp3
without a system library; soxr resamples. Neither Ray nor torch is imported. A read that never
returns is the caller's to bound (stalled.py).

Costs on one core, clips of 2 s at 22.05 kHz: `probe` opens the file and reads its header, 0.1 ms
(ogg, which also looks at the last page: 0.5 ms); `load` takes 0.9 ms (wav) to 2 ms (ogg), FLAC
1.5 ms, 0.5 ms of it resampling to 16 kHz. A clip is held whole in memory: 4 bytes a sample and
channel while it is decoded.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from raysft.config.schema import Data
from raysft.errors import BadExample

SHORTEST_S = 0.025  # one analysis frame of every front end here (25 ms)
MISSING_SHARE = 0.05  # of the samples a header promises that may be absent without complaint
MOST_SAMPLES = 1 << 40  # libsndfile says 2^63 - 1 where a stream was written without a length
# Sizes at the end of the 31- and 32-bit range are written by programs that stream a wav to a pipe
# and do not know its length: such a header promises nothing.
STREAMED_WAV_BYTES = 0x7FFF0000
OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the largest


class _File(soundfile.SoundFile):
    """soundfile 0.14 opens one file at a time in a process, for the sake of error messages: a file
    whose storage hangs would hold up all the others, and headers are to be awaited together."""

    _sf_error_lock = contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Limits:
    """Which clips are used, and how long reading one may take: the keys of `data` of these names.

    stalled: folder that remembers clips whose read did not return; None: nothing does.
    """

    min_seconds: float = SHORTEST_S
    max_seconds: float | None = None
    silence_db: float | None = None
    read_timeout_s: float = 60.0
    stalled: str | None = None

    @classmethod
    def of(cls, data: Data, run_folder: Path | None = None) -> Limits:
        """Those of a config; with `run_folder`, stalled clips are remembered there."""
        stalled = None if run_folder is None else str(run_folder.absolute() / "stalled")
        return cls(
            data.min_seconds, data.max_seconds, data.silence_db, data.read_timeout_s, stalled
        )


def probe(path: str, limits: Limits = Limits()) -> tuple[int, int]:
    """Length (samples a channel) and rate (Hz) of a clip, from its header: nothing is decoded.

    Raises BadExample where the file is missing, no regular file, empty, no audio, cut off, or
    shorter or longer than `limits` allow.
    """
    with _open(path, limits) as file:
        return file.frames, file.samplerate


def load(
    path: str, rate: int, limits: Limits = Limits(), most_seconds: float = math.inf
) -> np.ndarray:
    """Decode a clip: float32 [resampled_length(samples, its rate, rate)], mono at `rate` Hz.

    Channels are averaged. most_seconds: more than that by its header is refused undecoded, so that
    a clip which grew since it was indexed cannot take all memory. Raises BadExample as `probe`
    does, and where the clip cannot be decoded, has NaN or infinite samples, is silent (its peak
    below limits.silence_db), or ends more than 5% before its header says.
    """
    with _open(path, limits) as file:
        promised, own_rate = file.frames, file.samplerate
        if promised > most_seconds * own_rate:
            raise BadExample(
                f"{path}: longer than indexed: {promised / own_rate:.2f} s by its header, expected "
                f"at most {most_seconds:.2f} s: was the file replaced?"
            )
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            detail = error.error_string or f"libsndfile error {error.code}"
            raise BadExample(f"{path}: damaged or cut off: decoding failed ({detail})") from None
        except MemoryError:
            raise BadExample(f"{path}: {promised} samples do not fit into memory") from None
    if len(samples) < promised * (1 - MISSING_SHARE):
        raise BadExample(f"{path}: cut off: {len(samples)} of {promised} samples are there")
    channels = samples.shape[1]
    # A product with the weights 1/channels: ten times as fast as mean(axis=1).
    clip = samples[:, 0] if channels == 1 else samples @ np.full(channels, 1 / channels, np.float32)
    _check_length(path, len(clip), own_rate, limits)
    peak = max(float(clip.max()), -float(clip.min()))  # NaN where there is one
    if not math.isfinite(peak):
        raise BadExample(f"{path}: has NaN or infinite samples")
    if limits.silence_db is not None and peak < 10 ** (limits.silence_db / 20):
        level = f"its peak is {20 * math.log10(peak):.1f} dBFS" if peak else "all samples are 0"
        raise BadExample(
            f"{path}: silent: {level}, below data.silence_db={limits.silence_db:g} "
            "(data.silence_db=null keeps silence)"
        )
    return resample(clip, own_rate, rate)


def resample(clip: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Band-limited resampling (soxr HQ) of float32 [samples] to [resampled_length(...)]."""
    wanted = resampled_length(len(clip), from_rate, to_rate)
    if from_rate == to_rate:
        return np.ascontiguousarray(clip)
    clip = soxr.resample(clip, from_rate, to_rate, quality="HQ")
    # soxr gives this length; held to it here, for what was measured must be what is encoded.
    return clip[:wanted] if len(clip) >= wanted else np.pad(clip, (0, wanted - len(clip)))


def resampled_length(samples: int, from_rate: int, to_rate: int) -> int:
    """Samples a clip has after resampling: samples * to_rate / from_rate, halves rounded up."""
    return (2 * samples * to_rate + from_rate) // (2 * from_rate)


def _open(path: str, limits: Limits) -> _File:
    """Open a clip whose header makes sense, or raise BadExample."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise BadExample(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        detail = getattr(error, "strerror", None) or error
        raise BadExample(f"{path}: cannot be read ({detail})") from None
    if stat.S_ISDIR(status.st_mode):
        raise BadExample(f"{path}: a folder, not a file")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise BadExample(f"{path}: a pipe, socket or device, not a file")
    if status.st_size == 0:
        raise BadExample(f"{path}: empty file")
    if path.lower().endswith(".raw"):
        raise BadExample(f"{path}: raw samples have no header: convert the clip to wav or flac")
    if not os.access(path, os.R_OK):
        raise BadExample(f"{path}: cannot be read (permission denied)")
    try:
        file = _File(path)
    except soundfile.LibsndfileError:
        _check_ogg_is_whole(path, status.st_size)  # cut off early, it does not even open
        # Not libsndfile's own words: they may be those about a file another thread opens now.
        with open(path, "rb") as stream:
            head = stream.read(16)
        raise BadExample(f"{path}: not audio that can be read (it begins with {head!r})") from None
    try:
        _check_wav_is_whole(path, file)
        if file.format == "OGG":
            _check_ogg_is_whole(path, status.st_size)
        if file.frames > MOST_SAMPLES:
            raise BadExample(f"{path}: its header gives no length: write the clip anew")
        _check_length(path, file.frames, file.samplerate, limits)
    except BadExample:
        file.close()
        raise
    return file


def _check_wav_is_whole(path: str, file: _File) -> None:
    """A wav cut off while copying: libsndfile takes what is there and only notes the difference."""
    if file.format not in ("WAV", "WAVEX"):
        return
    note = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if note is None:
        return
    promised, present = int(note[1]), int(note[2])
    if promised < STREAMED_WAV_BYTES and present < promised * (1 - MISSING_SHARE):
        raise BadExample(f"{path}: cut off: {present} of {promised} bytes of samples are there")


def _check_ogg_is_whole(path: str, size: int) -> None:
    """An ogg cut off while copying ends inside a page; libsndfile takes the pages before it.

    Page headers: RFC 3533, section 6.
    """
    with open(path, "rb") as stream:
        stream.seek(max(0, size - OGG_PAGE))
        tail = stream.read(OGG_PAGE)
    at = len(tail)
    while (at := tail.rfind(b"OggS", 0, at)) >= 0:
        page = tail[at:]
        if len(page) >= 6 and (page[4] or page[5] > 7):
            continue  # version and flags say: these four bytes are data of a page
        sizes = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if len(page) < 27 or len(page) < 27 + page[26] + sum(sizes):
            raise BadExample(f"{path}: cut off: the file ends inside its last page")
        return


def _check_length(path: str, samples: int, rate: int, limits: Limits) -> None:
    if samples < limits.min_seconds * rate:
        raise BadExample(
            f"{path}: too short: {samples} samples at {rate} Hz, less than "
            f"data.min_seconds={limits.min_seconds:g}"
        )
    if limits.max_seconds is not None and samples > limits.max_seconds * rate:
        raise BadExample(
            f"{path}: too long: {samples / rate:.2f} s, more than "
            f"data.max_seconds={limits.max_seconds:g}"
        )
