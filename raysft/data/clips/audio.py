"""Clips -> mono float32 samples at the rate a model wants.

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
the end of the file. Of a part of a file the index measures the file, and asks it once for all its
parts; how parts are decoded is clips/cut.py's.

Costs on one core, clips of 2 s at 22.05 kHz: `probe` 0.02 to 0.2 ms (Vorbis 0.9 ms: libsndfile sets
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

from raysft import patience, stores
from raysft.config.schema import Data
from raysft.data.clips import cells, open_track
from raysft.data.clips.cut import Shared, bounds, length, sample_at
from raysft.data.clips.file import File, Piece, Track, decoding, resampled_length
from raysft.data.example import Audio, Cell, Within
from raysft.errors import BadExample

__all__ = [
    "ANY",
    "SHORTEST_S",
    "Limits",
    "Probed",
    "Shared",
    "load",
    "part_of",
    "probe",
    "resample",
    "resampled_length",
]

SHORTEST_S = 0.025  # one analysis frame of every front end here (25 ms)
CANCELLED = 0.1  # of the power of unrelated channels, below which their mix is not taken (10 dB)


@dataclass(frozen=True, slots=True)
class Limits:
    """Which clips are used, and how long reading one may take: the keys of `data` of these names.

    stalled: folder that remembers clips whose read did not return; None: nothing does.
    latents: values a second of latents that are read instead of clips; 0: clips are read.
    """

    min_seconds: float = SHORTEST_S
    max_seconds: float | None = None
    silence_db: float | None = None
    read_timeout_s: float = 60.0
    stalled: str | None = None
    latents: int = 0

    @classmethod
    def of(cls, data: Data, run_folder: Path | None = None) -> Limits:
        """Those of a config; with `run_folder`, stalled clips are remembered there."""
        stalled = None if run_folder is None else str(run_folder.absolute() / "stalled")
        return cls(
            data.min_seconds, data.max_seconds, data.silence_db, data.read_timeout_s, stalled
        )


ANY = Limits(min_seconds=0.0)
"""Of a file of which parts are clips: it may be as long as it will."""


class Probed(NamedTuple):
    """What the index keeps of a clip: samples of a channel, Hz, and the file's state (bytes, time
    of change; of a clip that its record carries there is no time). channels: of the file; None:
    not the same everywhere."""

    samples: int
    rate: int
    size: int
    mtime_ns: int
    channels: int | None


def probe(clip: Audio | str, limits: Limits = Limits()) -> Probed:
    """Length (samples a channel) and rate (Hz) of a clip, decoded only where that alone tells.

    clip: or the path of a file that is one. Raises BadExample where the file is missing, no regular
    file, empty, no audio, cut off, or the clip shorter or longer than `limits` allow, or no part of
    its file; OSError where its storage does not let it be read.
    """
    clip = _clip(clip)
    if clip.part:
        return part_of(clip, probe(clip.file, ANY), limits)
    size, mtime_ns = _status(clip)
    if clip.latents is not None:
        rate = _latent_rate(clip, limits)
        _check_length(clip.path, math.prod(clip.latents), rate, limits)
        return Probed(math.prod(clip.latents), rate, size, mtime_ns, 1)
    if (known := clip.measured) is not None:
        _check_length(clip.path, known.samples, known.rate, limits)
        return Probed(known.samples, known.rate, size, mtime_ns, known.channels)
    with _opened(clip, size) as file, closing(_track(file, limits)) as track:
        samples = track.samples
        if samples is None:
            samples = _counted(file, track, limits.max_seconds)
            _check_length(clip.path, samples, track.rate, limits)
        return Probed(samples, track.rate, size, mtime_ns, track.channels)


def part_of(clip: Audio, file: Probed, limits: Limits) -> Probed:
    """`probe` of a part, of whose file is known what `probe` said under the limits `ANY`."""
    first, last = bounds(clip, file.samples, file.rate)
    _check_channel(clip, file.channels)
    _check_length(clip.path, last - first, file.rate, limits)
    return file._replace(samples=last - first)


def load(
    clip: Audio | str,
    rate: int,
    limits: Limits = Limits(),
    most_seconds: float = math.inf,
    indexed: bool = False,
    shared: Shared | None = None,
) -> np.ndarray:
    """Decode a clip: float32 [resampled_length(samples, its rate, rate)], mono at `rate` Hz.

    clip: or the path of a file that is one. Of a part the samples are those of the whole, cut
    before they are mixed and resampled. Channels are averaged, where not one of them is meant;
    where they cancel each other, the loudest is taken. most_seconds: more than that is refused, by
    its header undecoded, so that a clip which grew since it was indexed cannot take all memory.
    indexed: the clip was there when the index was made; that it is missing is an OSError then, its
    storage's. shared: keeps what was decoded of a file for its other parts.

    Raises what `probe` does, and BadExample where the clip cannot be decoded, has NaN or infinite
    samples, is silent (its peak below limits.silence_db), or ends more than 5% before its header
    says.
    """
    clip = _clip(clip)
    path, state = clip.path, _status(clip, indexed)
    if clip.latents is not None:
        return _latents(clip, _latent_rate(clip, limits), limits)
    of_file = ANY if clip.part else limits
    # A part may be little of its file, which is then not read whole for it.
    with (
        _opened(clip, state[0], hold=not clip.part) as file,
        closing(_track(file, of_file)) as track,
    ):
        own_rate = track.rate
        if clip.part:
            samples = _part(clip, file, track, most_seconds, shared or Shared(), state)
        else:
            samples = _whole(clip, file, track, most_seconds)
    _check_length(path, len(samples), own_rate, limits)
    peak = max(float(samples.max()), -float(samples.min()))  # NaN where there is one
    if not math.isfinite(peak):
        raise BadExample(f"{path}: has NaN or infinite samples", "NaN or infinite")
    if limits.silence_db is not None and peak < 10 ** (limits.silence_db / 20):
        level = f"its peak is {20 * math.log10(peak):.1f} dBFS" if peak else "all samples are 0"
        raise BadExample(
            f"{path}: silent: {level}, below data.silence_db={limits.silence_db:g} "
            "(data.silence_db=null keeps silence)",
            "silent",
        )
    return resample(samples, own_rate, rate)


def _latent_rate(clip: Audio, limits: Limits) -> int:
    """Raises BadExample where clips are read, and no latents."""
    if not limits.latents:
        raise BadExample(f"{clip.path}: holds latents, and this model reads clips", "not audio")
    return limits.latents


def _latents(clip: Audio, rate: int, limits: Limits) -> np.ndarray:
    """The values of a cell of latents, frame by frame: float32 [frames * width]."""
    assert clip.latents is not None and isinstance(clip.held, Cell)
    found = np.frombuffer(cells.read(clip.held), "<f4")
    if len(found) != math.prod(clip.latents):
        raise BadExample(
            f"{clip.path}: holds {len(found)} values, and {math.prod(clip.latents)} when it was "
            "indexed: was the file replaced? A new run measures it again",
            "longer than indexed",
        )
    _check_length(clip.path, len(found), rate, limits)
    if not np.isfinite(found).all():
        raise BadExample(f"{clip.path}: has NaN or infinite values", "NaN or infinite")
    return found


def _whole(clip: Audio, file: File, track: Track, most_seconds: float) -> np.ndarray:
    """All of a file: float32 [samples], mono at the track's rate."""
    _check_grown(clip.path, track.samples or 0, track.rate, most_seconds)
    pieces = _decoded(file, track, most_seconds * track.rate)
    _check_grown(clip.path, length(pieces, track.rate), track.rate, most_seconds)
    return _mono(clip, pieces, track.rate)


def _part(
    clip: Audio,
    file: File,
    track: Track,
    most_seconds: float,
    shared: Shared,
    state: tuple[int, int],
) -> np.ndarray:
    """A part of a file: float32 [samples], mono at the track's rate."""
    rate = track.rate
    if track.samples is not None:
        first, last = bounds(clip, track.samples, rate)
        _check_channel(clip, track.channels)
        _check_grown(clip.path, last - first, rate, most_seconds)
        if track.part is not None:
            return _mono(clip, [(track.part(first, last), rate)], rate)
    if clip.stop is None:
        most = (clip.start + most_seconds) * rate + 1
    else:
        most = sample_at(clip.stop, rate)
    decode = partial(_decoded, file, track)
    pieces = shared.decode((clip.file, state), decode, most, rate)
    first, last = bounds(clip, length(pieces, rate), rate)
    _check_grown(clip.path, last - first, rate, most_seconds)
    if len(pieces) == 1:
        return _mono(clip, [(pieces[0][0][first:last], rate)], rate).copy()
    return _mono(clip, pieces, rate)[first:last].copy()


def _mono(clip: Audio, pieces: list[Piece], rate: int) -> np.ndarray:
    """float32 [samples] at `rate`: the channel that is meant, or all mixed."""
    parts = []
    for samples, own_rate in pieces:
        _check_channel(clip, samples.shape[1])
        one = mixed(samples) if clip.channel is None else samples[:, clip.channel]
        parts.append(resample(one, own_rate, rate))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


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


def _clip(clip: Audio | str) -> Audio:
    return Audio(clip) if isinstance(clip, str) else clip


@contextmanager
def _opened(clip: Audio, size: int, hold: bool = False) -> Iterator[File]:
    """A file to decode. Raises OSError where a read of it failed, whatever was made of that."""
    with closing(File(clip.path, hold, clip.bytes, clip.held, size)) as file:
        try:
            yield file
        except Exception as error:
            if file.error is not None:
                raise file.error from error
            raise
        if file.error is not None:
            raise file.error


def _status(clip: Audio, indexed: bool = False) -> tuple[int, int]:
    """The file's bytes, and its time of change (ns). Raises BadExample where opening it makes no
    sense."""
    stored = clip.stored
    state = _state(stored, indexed) if stored is not None else (len(clip.bytes or b""), 0)
    size = clip.held.size if isinstance(clip.held, Within) else state[0]
    if size == 0:
        raise BadExample(f"{clip.path}: empty file", "empty")
    if clip.path.lower().endswith(".raw"):
        raise BadExample(
            f"{clip.path}: raw samples have no header: convert the clip to wav or flac", "not audio"
        )
    return state


def _state(path: str, indexed: bool) -> tuple[int, int]:
    try:
        if stores.is_remote(path):
            return stores.status(path)
        status = os.stat(path)
    except ValueError as error:  # a NUL in the path
        raise BadExample(f"{path}: cannot be read ({error})", "unreadable") from None
    except IsADirectoryError:
        raise BadExample(f"{path}: a folder, not a file", "folder") from None
    except OSError as error:
        if not patience.momentary(error):
            raise BadExample(
                f"{path}: cannot be read ({error.strerror or error})", "unreadable"
            ) from None
        if not indexed and patience.missing(error):
            raise BadExample(f"{path}: no such file", "missing") from None
        raise
    if stat.S_ISDIR(status.st_mode):
        raise BadExample(f"{path}: a folder, not a file", "folder")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise BadExample(f"{path}: a pipe, socket or device, not a file", "not a file")
    return status.st_size, status.st_mtime_ns


def _track(file: File, limits: Limits) -> Track:
    """The sound in a file, whose length makes sense so far as it is known."""
    track = open_track(file)
    if track.samples is not None:
        _check_length(file.path, track.samples, track.rate, limits)
    return track


def _decoded(file: File, track: Track, most: float) -> list[Piece]:
    """All of a clip, or hardly more than `most` samples."""
    with decoding(file.path):
        return track.decode(most)


def _counted(file: File, track: Track, most_seconds: float | None) -> int:
    """Samples of a clip whose length only decoding tells."""
    most = math.inf if most_seconds is None else most_seconds * track.rate
    if track.count is None:
        return length(_decoded(file, track, most), track.rate)
    with decoding(file.path):
        return track.count(most)


def _check_channel(clip: Audio, channels: int | None) -> None:
    """channels: that there are; None: not known yet."""
    if clip.channel is not None and not 0 <= clip.channel < (channels or math.inf):
        there = "" if channels is None else f": it has {channels}, counted from 0"
        raise BadExample(f"{clip.path}: has no channel {clip.channel}{there}", "no such part")


def _check_grown(path: str, samples: int, rate: int, most_seconds: float) -> None:
    if samples > most_seconds * rate:
        raise BadExample(
            f"{path}: longer than indexed: {samples / rate:.2f} s, expected at most "
            f"{most_seconds:.2f} s: was the file replaced (a new run measures it again), or is it "
            "several, joined end to end (write the clip anew)?",
            "longer than indexed",
        )


def _check_length(path: str, samples: int, rate: int, limits: Limits) -> None:
    if samples < limits.min_seconds * rate:
        raise BadExample(
            f"{path}: too short: {samples} samples at {rate} Hz, less than "
            f"data.min_seconds={limits.min_seconds:g}",
            "too short",
        )
    if limits.max_seconds is not None and samples > limits.max_seconds * rate:
        raise BadExample(
            f"{path}: too long: {samples / rate:.2f} s, more than "
            f"data.max_seconds={limits.max_seconds:g}",
            "too long",
        )
