"""Clips on disk -> mono float32 samples at the rate a model wants.

Stands under the index (`probe`: lengths) and under the encoders in the data tasks (`load`: decode,
mix, resample). The files themselves are clips/'s: wav, flac, ogg (Vorbis, Opus), mp3 and more by
soundfile without a system library, m4a, aac and webm by PyAV where it is installed. soxr
resamples. Neither Ray nor torch is imported. A read that never returns is the caller's to bound
(stalled.py).

A length is read from the header where the header can be held against the file: wav and its kin
(bytes of samples), flac (its last frame), ogg (its last page), mp3 with an encoder's note whose
bytes are the file's. That takes two or three reads. MP3 without such a note is read whole and its
frames are counted (a million hours at 64 kbit/s: 28 TB, once); decoded in the index are only flac
whose header and last frame disagree, ogg that was recorded from the middle of a stream, and what
PyAV reads. What a header merely guesses is never believed, here or in `load`, which decodes to
the end of the file.

Costs on one core, clips of 2 s at 22.05 kHz: `probe` 0.1 to 0.3 ms (Vorbis 0.9 ms: libsndfile sets
its decoder up); `load` 0.9 ms (wav), 1.5 ms (flac), 2 to 3 ms (Vorbis, mp3), 0.5 ms of it
resampling to 16 kHz. A clip is held whole in memory: its file (up to 64 MB of it), and 4 bytes a
sample and channel while it is decoded.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

from raysft import patience
from raysft.config.schema import Data
from raysft.data.clips import open_track
from raysft.data.clips.file import File, Piece, Track, decoding, resampled_length
from raysft.errors import BadExample

__all__ = ["SHORTEST_S", "Limits", "Probed", "load", "probe", "resample", "resampled_length"]

SHORTEST_S = 0.025  # one analysis frame of every front end here (25 ms)
CANCELLED = 0.1  # of the power of unrelated channels, below which their mix is not taken (10 dB)


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


class Probed(NamedTuple):
    """What the index keeps of a clip: samples of a channel, Hz, and the file's state."""

    samples: int
    rate: int
    size: int
    mtime_ns: int


def probe(path: str, limits: Limits = Limits()) -> Probed:
    """Length (samples a channel) and rate (Hz) of a clip, decoded only where that alone tells.

    Raises BadExample where the file is missing, no regular file, empty, no audio, cut off, or
    shorter or longer than `limits` allow; OSError where its storage does not let it be read.
    """
    status = _status(path)
    with _opened(path) as file, closing(_track(file, limits)) as track:
        samples = track.samples
        if samples is None:
            samples = _counted(file, track, limits.max_seconds)
            _check_length(path, samples, track.rate, limits)
        return Probed(samples, track.rate, status.st_size, status.st_mtime_ns)


def load(
    path: str,
    rate: int,
    limits: Limits = Limits(),
    most_seconds: float = math.inf,
    indexed: bool = False,
) -> np.ndarray:
    """Decode a clip: float32 [resampled_length(samples, its rate, rate)], mono at `rate` Hz.

    Channels are averaged; where they cancel each other, the loudest is taken. most_seconds: more
    than that is refused, by its header undecoded, so that a clip which grew since it was indexed
    cannot take all memory. indexed: the clip was there when the index was made; that it is missing
    is an OSError then, its storage's. Raises what `probe` does, and BadExample where the clip
    cannot be decoded, has NaN or infinite samples, is silent (its peak below limits.silence_db),
    or ends more than 5% before its header says.
    """
    _status(path, indexed)
    with _opened(path, hold=True) as file, closing(_track(file, limits)) as track:
        own_rate = track.rate
        _check_grown(path, track.samples or 0, own_rate, most_seconds)
        pieces = _decoded(file, track, most_seconds)
    _check_grown(path, _length(pieces, own_rate), own_rate, most_seconds)
    parts = [resample(mixed(samples), piece_rate, own_rate) for samples, piece_rate in pieces]
    clip = parts[0] if len(parts) == 1 else np.concatenate(parts)
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


def mixed(samples: np.ndarray) -> np.ndarray:
    """float32 [samples, channels] -> [samples]: their mean, or the loudest channel alone.

    Channels in opposite phase cancel in the mean. Unrelated ones of powers p give it the power
    sum(p) / channels^2; where it has less than a tenth of that (10 dB), the loudest is taken, the
    first of equals.
    """
    channels = samples.shape[1]
    if channels == 1:
        return samples[:, 0]
    # A product with the weights 1/channels: ten times as fast as mean(axis=1).
    mix = samples @ np.full(channels, 1 / channels, np.float32)
    powers = np.einsum("sc,sc->c", samples, samples)
    # Not where there is a NaN, which the mix has as well.
    if float(mix @ mix) < CANCELLED * float(powers.sum()) / channels**2:
        return np.ascontiguousarray(samples[:, int(powers.argmax())])
    return mix


def resample(clip: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Band-limited resampling (soxr HQ) of float32 [samples] to [resampled_length(...)]."""
    wanted = resampled_length(len(clip), from_rate, to_rate)
    if from_rate == to_rate:
        return np.ascontiguousarray(clip)
    clip = soxr.resample(clip, from_rate, to_rate, quality="HQ")
    # soxr gives this length; held to it here, for what was measured must be what is encoded.
    return clip[:wanted] if len(clip) >= wanted else np.pad(clip, (0, wanted - len(clip)))


@contextmanager
def _opened(path: str, hold: bool = False) -> Iterator[File]:
    """A file to decode. Raises OSError where a read of it failed, whatever was made of that."""
    with closing(File(path, hold)) as file:
        try:
            yield file
        except Exception as error:
            if file.error is not None:
                raise file.error from error
            raise
        if file.error is not None:
            raise file.error


def _status(path: str, indexed: bool = False) -> os.stat_result:
    """The file's state. Raises BadExample where opening it makes no sense."""
    try:
        status = os.stat(path)
    except ValueError as error:  # a NUL in the path
        raise BadExample(f"{path}: cannot be read ({error})") from None
    except OSError as error:
        if not patience.momentary(error):
            raise BadExample(f"{path}: cannot be read ({error.strerror or error})") from None
        if not indexed and patience.missing(error):
            raise BadExample(f"{path}: no such file") from None
        raise
    if stat.S_ISDIR(status.st_mode):
        raise BadExample(f"{path}: a folder, not a file")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise BadExample(f"{path}: a pipe, socket or device, not a file")
    if status.st_size == 0:
        raise BadExample(f"{path}: empty file")
    if path.lower().endswith(".raw"):
        raise BadExample(f"{path}: raw samples have no header: convert the clip to wav or flac")
    return status


def _track(file: File, limits: Limits) -> Track:
    """The sound in a file, whose length makes sense so far as it is known."""
    track = open_track(file)
    if track.samples is not None:
        _check_length(file.path, track.samples, track.rate, limits)
    return track


def _decoded(file: File, track: Track, most_seconds: float | None) -> list[Piece]:
    """All of a clip, or hardly more than most_seconds."""
    most = math.inf if most_seconds is None else most_seconds * track.rate
    with decoding(file.path):
        return track.decode(most)


def _counted(file: File, track: Track, most_seconds: float | None) -> int:
    """Samples of a clip whose length only decoding tells."""
    if track.count is None:
        return _length(_decoded(file, track, most_seconds), track.rate)
    with decoding(file.path):
        return track.count(math.inf if most_seconds is None else most_seconds * track.rate)


def _length(pieces: list[Piece], rate: int) -> int:
    """Samples of a channel at `rate`, of all pieces together."""
    return sum(resampled_length(len(samples), own, rate) for samples, own in pieces)


def _check_grown(path: str, samples: int, rate: int, most_seconds: float) -> None:
    if samples > most_seconds * rate:
        raise BadExample(
            f"{path}: longer than indexed: {samples / rate:.2f} s, expected at most "
            f"{most_seconds:.2f} s: was the file replaced (a new run measures it again), or is it "
            "several, joined end to end (write the clip anew)?"
        )


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
