"""What is done to a clip to vary it: functions of samples, and of what augment.py draws.

All take and give float32 [samples] at `rate` Hz; none but `at_speed` changes a clip's length. Costs
on one core for a clip of 2 s at 16 kHz: see docs/audio.md.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import soundfile
import soxr

TELEPHONE = 8000  # Hz
OPUS = (8000, 12000, 16000, 24000, 48000)  # Hz that it codes
BLOCK = 1 << 14  # samples handed to a codec at once: libsndfile's Vorbis has them all on its stack
ORDER = 4  # of the filter of a band: 24 dB an octave, twice
_FILES = {
    "mulaw": ("WAV", "ULAW"),
    "gsm": ("WAV", "GSM610"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
    "vorbis": ("OGG", "VORBIS"),
}


def length_at(samples: int, factor: float) -> int:
    """Samples of a clip that is played so much faster."""
    return math.floor(samples / factor + 0.5)


def at_speed(clip: np.ndarray, factor: float) -> np.ndarray:
    """The clip played `factor` times as fast, pitch and all: [length_at(samples, factor)].

    As sox's `speed`: its samples taken for those of another rate, and resampled (soxr HQ).
    """
    if factor == 1:
        return clip
    return fitted(soxr.resample(clip, factor, 1.0, quality="HQ"), length_at(len(clip), factor))


def louder(clip: np.ndarray, db: float) -> np.ndarray:
    """Its samples times as much."""
    return clip * np.float32(10 ** (db / 20))


def power(clip: np.ndarray) -> float:
    """Mean of its squares."""
    return float(np.mean(np.square(clip, dtype=np.float64)))


def with_noise(clip: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """The sum of both, where the clip has `snr_db` more power, over all its length.

    noise: of the clip's length. Where one of them is silent no ratio can be had: the clip as it is.
    """
    own, other = power(clip), power(noise)
    if not own or not other:
        return clip
    gain = math.sqrt(own / other) * 10 ** (-snr_db / 20)
    return (clip + np.float32(gain) * noise).astype(np.float32, copy=False)


def together(voices: Sequence[np.ndarray]) -> np.ndarray:
    """Clips of one length, added at the same power each; silent ones add nothing."""
    return np.sum([v / np.float32(math.sqrt(power(v)) or 1.0) for v in voices], axis=0)


def repeated(noise: np.ndarray, first: int, samples: int) -> np.ndarray:
    """[samples] of endless repeats of `noise`, from its sample `first` on."""
    return np.resize(np.roll(noise, -first), samples)


def in_room(clip: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The clip heard through a room, with the power that it had.

    response: of the room to an impulse. What it delays the direct sound (its peak) by is taken off,
    so that texts and times still fit; the echo behind the clip's end is cut.
    """
    from scipy import signal  # a second to import, of those alone that need it

    own = power(clip)
    first = int(np.abs(response).argmax())
    heard = signal.fftconvolve(clip, response)[first : first + len(clip)]
    if not own or not (now := power(heard)):
        return clip
    return (heard * math.sqrt(own / now)).astype(np.float32)


def room(rng: np.random.Generator, rate: int, rt60: float, direct_db: float) -> np.ndarray:
    """A room without walls or corners: an impulse, and behind it noise that decays exponentially.

    Polack's model (1988), good beyond the first reflections. rt60: seconds in which it loses 60 dB.
    direct_db: power of the impulse over that of the noise.
    """
    count = max(1, round(rt60 * rate))
    echo = rng.standard_normal(count) * 10 ** (-3 * np.arange(count) / (rt60 * rate))
    echo *= 10 ** (-direct_db / 20) / math.sqrt(float(echo @ echo))
    return np.concatenate([[1.0], echo]).astype(np.float32)


def in_band(clip: np.ndarray, rate: int, low: float | None, high: float) -> np.ndarray:
    """What is between two frequencies (Hz; None: no lower one), without a delay.

    A Butterworth filter, forward and backward: it is 6 dB down at each. Frequencies that the rate
    does not have need no filter.
    """
    from scipy import signal

    if high < rate / 2:
        edges, kind = ((low, high), "bandpass") if low is not None else (high, "lowpass")
    elif low is not None:
        edges, kind = low, "highpass"
    else:
        return clip
    filters = signal.butter(ORDER, edges, kind, fs=rate, output="sos")
    return signal.sosfiltfilt(filters, clip).astype(np.float32)


def coded(clip: np.ndarray, rate: int, kind: str, compression: float) -> np.ndarray:
    """Through a codec and back, by libsndfile, in memory.

    kind: mulaw, gsm (at 8 kHz, as on the telephone), mp3, opus or vorbis at the clip's rate, or the
    next that opus has. compression: of these, from 0 (best) to below 1 (smallest). A clip so quiet
    that nothing would be left of it stays as it is.
    """
    container, subtype = _FILES[kind]
    own = rate
    if kind in ("mulaw", "gsm"):
        own = TELEPHONE
    elif kind == "opus":
        own = next((known for known in OPUS if known >= rate), OPUS[-1])
    level = None if own == TELEPHONE and kind in ("mulaw", "gsm") else compression
    sent = unclipped(clip if own == rate else soxr.resample(clip, rate, own, quality="HQ"))
    memory = io.BytesIO()
    with soundfile.SoundFile(
        memory, "w", own, 1, subtype, format=container, compression_level=level
    ) as file:
        for first in range(0, len(sent), BLOCK):
            file.write(sent[first : first + BLOCK])
    memory.seek(0)
    heard = soundfile.read(memory, dtype="float32")[0]
    if not heard.any():
        return clip
    if own != rate:
        heard = soxr.resample(heard, own, rate, quality="HQ")
    return fitted(heard, len(clip))


def unclipped(clip: np.ndarray) -> np.ndarray:
    """The clip, made quieter where a sample is beyond 1."""
    peak = max(float(clip.max()), -float(clip.min()))
    return clip if peak <= 1 else clip / np.float32(peak)


def fitted(clip: np.ndarray, samples: int) -> np.ndarray:
    """[samples]: cut, or silence behind it."""
    if len(clip) >= samples:
        return clip[:samples]
    return np.pad(clip, (0, samples - len(clip)))
