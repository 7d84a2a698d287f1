"""Augmentation: clips that the model hears are varied while they are read for training.

Stands between `audio.load` and the encoders (`Encoder.encode`). What is done to a clip follows from
(seed, epoch, step, lane, slot), the clip's number in its example, and the kind: each kind has
random numbers of its own, so that turning one on changes nothing that another draws. Kinds are done
in the order in which sound meets them: speed, room, other voices, noise, the channel's band and
codec, volume; then stripes of the features. A clip that nothing was done to is as it was, bit for
bit; one that something was done to is made quieter where it would be beyond 1.

Recordings that are added (`Pools`) are listed once by the driver (driver/pools.py) and kept in the
run's folder: a run draws from the same ones to its end. Costs: see docs/audio.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from raysft.config.augment import Augment
from raysft.config.schema import Data
from raysft.data.clips import effects
from raysft.data.clips.audio import ANY, Limits, load
from raysft.data.clips.recordings import FILE, Pools, Recording
from raysft.data.clips.stalled import LOST, ClipReader
from raysft.data.clips.stripes import Spectrogram
from raysft.data.example import Audio
from raysft.errors import BadExample, UserError

# Which random numbers a kind has. Never changed: runs go on with those that they began with.
STREAMS = {
    "speed": 1,
    "reverb": 2,
    "babble": 3,
    "noise": 4,
    "band": 5,
    "codec": 6,
    "volume": 7,
    "spec": 8,
}
_KINDS = 16  # at most, of a clip
_STREAM = 1 << 32  # of Philox's counter: more than a stream takes
_KEPT = 64 << 20  # bytes of recordings that a process keeps decoded


class Augmentation:
    """What `data.augment` says, and what it takes. Picklable.

    budget, heard: positions, and seconds for the model's encoder, that a micro-batch may have
    (data.tokens_per_batch, data.audio_per_batch); None: not known yet, or no limit.
    """

    def __init__(
        self,
        settings: Augment,
        pools: Pools | None = None,
        budget: int | None = None,
        heard: float | None = None,
    ) -> None:
        self.settings, self.pools = settings, pools or Pools()
        self.budget, self.heard = budget, heard
        self._readers: dict[Limits, ClipReader] = {}
        self._kept: dict[tuple[Audio, int], np.ndarray] = {}

    @classmethod
    def of(cls, data: Data, folder: Path) -> Augmentation | None:
        """Of a config, with the recordings that the run in `folder` has; None where no clip is ever
        varied."""
        settings = data.augment
        if settings is None or not settings.given:
            return None
        budget = data.tokens_per_batch if isinstance(data.tokens_per_batch, int) else None
        return cls(settings, Pools.load(folder), budget, data.audio_per_batch)

    def with_pools(self, pools: Pools) -> Augmentation:
        """The same, with these recordings."""
        return Augmentation(self.settings, pools, self.budget, self.heard)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_readers": {}, "_kept": {}}

    @property
    def factors(self) -> list[float]:
        """Of speed that may be drawn; none where it is left as it is."""
        speed = self.settings.speed
        return [] if speed is None else speed.factors

    @property
    def lengthens(self) -> str:
        """What decides how much longer than it is an example may become; "": nothing does."""
        if not self.settings.slower:
            return ""
        return f"speed {self.settings.slower} within {self.budget} positions, {self.heard} s"

    def varied(
        self,
        clip: np.ndarray,
        rate: int,
        rng: np.random.Generator,
        number: int,
        factors: Sequence[float],
        limits: Limits,
    ) -> np.ndarray:
        """The clip as it is heard this time: float32 [length_at(samples, one of factors)], or as it
        was where nothing is drawn.

        clip: float32 [samples] at `rate` Hz. rng: of its example. number: of the clip there.
        factors: of speed, for which there is room: another one leaves the clip as it is. limits:
        how long reading may take. Raises UserError where a recording cannot be read.
        """
        mixed = partial(self._mixed, rate=rate, limits=limits)
        found = clip
        for kind in self.settings.given:
            draws = self.draws(kind, rng, number)
            if kind == "spec" or draws is None:
                continue
            if kind == "speed":
                factor = self.factors[int(draws.integers(len(self.factors)))]
                if factor in factors:
                    found = effects.at_speed(found, factor)
            elif kind == "reverb":
                found = effects.in_room(found, self._response(draws, rate, limits))
            elif kind in ("noise", "babble"):
                found = mixed(found, kind, draws)
            else:
                found = self._through(found, kind, rate, draws)
        return clip if found is clip else effects.unclipped(found)

    def tried(self, clip: np.ndarray, rate: int, seed: int) -> np.ndarray:
        """The clip as it may be heard, to listen to: another one for each seed. As `varied`."""
        rng = np.random.Generator(np.random.Philox(key=seed))
        return self.varied(clip, rate, rng, 0, self.factors, Limits())

    def masked(
        self,
        arrays: Mapping[str, np.ndarray],
        where: Spectrogram,
        samples: int,
        rng: np.random.Generator,
        number: int,
    ) -> Mapping[str, np.ndarray]:
        """A clip's arrays, its features with stripes. samples: of the clip as it was heard."""
        spec, draws = self.settings.spec, self.draws("spec", rng, number)
        if spec is None or draws is None:
            return arrays
        return {**arrays, where.name: where.masked(arrays[where.name], samples, spec, draws)}

    def draws(self, kind: str, rng: np.random.Generator, number: int) -> np.random.Generator | None:
        """The random numbers of a kind for a clip; None where it is not varied so this time.

        rng: of the example, from which nothing is taken; on Philox.
        """
        settings = getattr(self.settings, kind)
        if settings is None:
            return None
        state = rng.bit_generator.state["state"]
        counter = np.array(state["counter"], np.uint64)
        # Its first number counts the draws of the example itself: few, from 0.
        counter[0] = (number * _KINDS + STREAMS[kind]) * _STREAM
        found = np.random.Generator(np.random.Philox(counter=counter, key=state["key"]))
        return found if found.random() < settings.p else None

    def _through(
        self, clip: np.ndarray, kind: str, rate: int, draws: np.random.Generator
    ) -> np.ndarray:
        """A channel, a codec or another volume."""
        settings = self.settings
        if kind == "volume":
            assert settings.volume is not None
            return effects.louder(clip, _between(draws, settings.volume.db))
        if kind == "band":
            assert settings.band is not None
            high = _between(draws, settings.band.high_hz)
            low = settings.band.low_hz
            lowest = None if low is None else _between(draws, low)
            return effects.in_band(clip, rate, lowest, high)
        assert settings.codec is not None
        codec = settings.codec.kinds[int(draws.integers(len(settings.codec.kinds)))]
        return effects.coded(clip, rate, codec, _between(draws, settings.codec.compression))

    def _mixed(
        self, clip: np.ndarray, kind: str, draws: np.random.Generator, rate: int, limits: Limits
    ) -> np.ndarray:
        if kind == "noise":
            assert self.settings.noise is not None
            snr_db = _between(draws, self.settings.noise.snr_db)
            noise = self._piece(kind, draws, len(clip), rate, limits)
        else:
            babble = self.settings.babble
            assert babble is not None
            snr_db = _between(draws, babble.snr_db)
            voices = int(draws.integers(babble.speakers[0], babble.speakers[1] + 1))
            pieces = [self._piece(kind, draws, len(clip), rate, limits) for _ in range(voices)]
            noise = effects.together(pieces)
        return effects.with_noise(clip, noise, snr_db)

    def _response(self, draws: np.random.Generator, rate: int, limits: Limits) -> np.ndarray:
        reverb = self.settings.reverb
        assert reverb is not None
        if reverb.path is None:
            rt60, direct_db = _between(draws, reverb.rt60), _between(draws, reverb.direct_db)
            return effects.room(draws, rate, rt60, direct_db)
        return self._whole("reverb", self._drawn("reverb", draws), rate, limits)

    def _drawn(self, kind: str, draws: np.random.Generator) -> Recording:
        pool = self.pools.recordings.get(kind)
        if not pool:
            raise UserError(
                f"data.augment.{kind}: the run's folder has no {FILE} that lists its recordings: "
                "without it nothing is read as it was"
            )
        return pool[int(draws.integers(len(pool)))]

    def _piece(
        self, kind: str, draws: np.random.Generator, samples: int, rate: int, limits: Limits
    ) -> np.ndarray:
        """[samples] of a recording from anywhere in it, repeated where it has fewer."""
        one = self._drawn(kind, draws)
        place = draws.random()
        wanted = -(-samples * one.rate // rate) + 1  # of its own samples
        if one.samples <= wanted:
            whole = self._whole(kind, one, rate, limits)
            return effects.repeated(whole, int(place * len(whole)), samples)
        first = int(place * (one.samples - wanted + 1))
        start = one.audio.start + first / one.rate
        part = replace(one.audio, start=start, stop=start + wanted / one.rate)
        return effects.fitted(self._read(kind, part, rate, limits), samples)

    def _whole(self, kind: str, one: Recording, rate: int, limits: Limits) -> np.ndarray:
        """All of a recording; kept for the next time."""
        key = (one.audio, rate)
        if key not in self._kept:
            found = self._read(kind, one.audio, rate, limits)
            while self._kept and sum(map(_bytes, self._kept.values())) + found.nbytes > _KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = found
        return self._kept[key]

    def _read(self, kind: str, audio: Audio, rate: int, limits: Limits) -> np.ndarray:
        if limits not in self._readers:
            self._readers[limits] = ClipReader(limits)
        decode = partial(load, rate=rate, limits=ANY, indexed=True)
        try:
            return self._readers[limits].call(decode, audio)
        except BadExample as error:  # it is no example: nothing can be left out for it
            raise UserError(
                f"data.augment.{kind}.path: {error}: a run draws from the recordings that it began "
                "with: put it back as it was, then start again"
            ) from None
        except UserError as error:
            raise UserError(f"data.augment.{kind}.path: {str(error).removesuffix(LOST)}") from None


def _between(draws: np.random.Generator, ends: list[float]) -> float:
    return float(draws.uniform(ends[0], ends[1]))


def _bytes(array: np.ndarray) -> int:
    return array.nbytes
