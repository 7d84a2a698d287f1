"""The section of the config that says how clips are varied in training: `data.augment`."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from raysft.config.marks import Fixed, PathKey
from raysft.config.section import Section

KnownCodec = Literal["mulaw", "gsm", "mp3", "opus", "vorbis"]
SLOWEST, FASTEST = 0.5, 2.0  # of data.augment.speed.factors


def _rising(found: list[float]) -> list[float]:
    if found[0] > found[1]:
        raise ValueError("[least, most] with least no larger than most")
    return found


def _hertz(found: list[float]) -> list[float]:
    if found[0] <= 0:
        raise ValueError("frequencies above 0 Hz")
    return _rising(found)


def _decay(found: list[float]) -> list[float]:
    if found[0] <= 0:
        raise ValueError("seconds above 0")
    return _rising(found)


def _share(found: list[float]) -> list[float]:
    if found[0] < 0 or found[1] >= 1:
        raise ValueError("numbers from 0 to below 1")
    return _rising(found)


def _voices(found: list[int]) -> list[int]:
    if found[0] < 1 or found[0] > found[1]:
        raise ValueError("[least, most] of at least 1 voice, with least no larger than most")
    return found


def _factors(found: list[float]) -> list[float]:
    if not all(SLOWEST <= factor <= FASTEST for factor in found):
        raise ValueError(f"factors from {SLOWEST:g} (slow) to {FASTEST:g} (fast)")
    if len(set(found)) != len(found):
        raise ValueError("factors that differ")
    return found


_Two = Annotated[list[float], Field(min_length=2, max_length=2)]
Range = Annotated[_Two, AfterValidator(_rising)]
Hertz = Annotated[_Two, AfterValidator(_hertz)]
Seconds = Annotated[_Two, AfterValidator(_decay)]
Share = Annotated[_Two, AfterValidator(_share)]
Voices = Annotated[list[int], Field(min_length=2, max_length=2), AfterValidator(_voices)]
Factors = Annotated[list[PositiveFloat], Field(min_length=1), AfterValidator(_factors)]
_READ = PathKey("data", read=True)


class Kind(Section):
    """One way to vary a clip."""

    p: Fixed[float] = Field(ge=0, le=1, description="share of clips that are varied so")


class Speed(Kind):
    """Clips played slower or faster, tempo and pitch together, as sox `speed` does."""

    factors: Fixed[Factors] = Field(
        default_factory=lambda: [0.9, 1.0, 1.1],
        description="one of these is drawn; below 1: slower, and so longer; examples are planned "
        "at their slowest; one that model or micro-batch have no room for leaves the clip as it is",
    )


class Volume(Kind):
    """Louder or quieter."""

    db: Fixed[Range] = Field(
        default_factory=lambda: [-6.0, 6.0], description="[least, most] in dB; 0: as it is"
    )


class Noise(Kind):
    """Noise of recordings, added."""

    path: Fixed[Annotated[str, _READ]] = Field(
        description="a folder of recordings, or data in any format that data.train takes; a run "
        "keeps the list that it began with"
    )
    snr_db: Fixed[Range] = Field(
        default_factory=lambda: [5.0, 20.0],
        description="[least, most] dB that the clip has more power than the noise",
    )


class Babble(Kind):
    """Several voices at once, added."""

    path: Fixed[Annotated[str | None, _READ]] = Field(
        None,
        description="a folder of recordings of single voices, or data in any format that "
        "data.train takes; default: clips of data.train, up to 1,000 of them, drawn once",
    )
    snr_db: Fixed[Range] = Field(
        default_factory=lambda: [10.0, 20.0],
        description="[least, most] dB that the clip has more power than all voices together",
    )
    speakers: Fixed[Voices] = Field(
        default_factory=lambda: [3, 7], description="[least, most] voices"
    )


class Reverb(Kind):
    """The echo of a room; as loud as before."""

    path: Fixed[Annotated[str | None, _READ]] = Field(
        None,
        description="a folder of room impulse responses (or data that lists them); default: noise "
        "that decays exponentially, after Polack",
    )
    rt60: Fixed[Seconds] = Field(
        default_factory=lambda: [0.2, 0.6],
        description="without path: [least, most] seconds in which the echo loses 60 dB",
    )
    direct_db: Fixed[Range] = Field(
        default_factory=lambda: [0.0, 12.0],
        description="without path: [least, most] dB that the direct sound has more power than its "
        "echo",
    )


class Codec(Kind):
    """Coded and decoded again, in memory."""

    kinds: Fixed[Annotated[list[KnownCodec], Field(min_length=1)]] = Field(
        default_factory=lambda: [*get_args(KnownCodec)],
        description="one of these is drawn; mulaw, gsm: at 8 kHz, as telephones do",
    )
    compression: Fixed[Share] = Field(
        default_factory=lambda: [0.5, 0.95],
        description="[least, most] of mp3, opus and vorbis, on libsndfile's scale from 0 (best "
        "quality) to 1 (smallest)",
    )


class Band(Kind):
    """What a narrow channel lets through."""

    low_hz: Fixed[Hertz | None] = Field(
        None, description="[least, most] Hz below which nothing passes; default: all does"
    )
    high_hz: Fixed[Hertz] = Field(
        default_factory=lambda: [3400.0, 4000.0],
        description="[least, most] Hz above which nothing passes",
    )


class Spec(Kind):
    """SpecAugment (Park et al. 2019): stripes of the features that the model reads are masked with
    their mean."""

    freq_masks: Fixed[NonNegativeInt] = Field(2, description="stripes of mel bins")
    freq_width: Fixed[PositiveInt] = Field(27, description="mel bins of a stripe at most")
    time_masks: Fixed[NonNegativeInt] = Field(2, description="stripes of frames")
    time_width: Fixed[PositiveFloat] = Field(
        0.05, le=1, description="share of a clip's frames that a stripe has at most"
    )


class Augment(Section):
    """How clips that the model hears are varied in training, each kind with a chance of its own."""

    speed: Fixed[Speed | None] = Field(None, description="slower or faster")
    reverb: Fixed[Reverb | None] = Field(None, description="the echo of a room")
    babble: Fixed[Babble | None] = Field(None, description="other voices, added")
    noise: Fixed[Noise | None] = Field(None, description="recorded noise, added")
    band: Fixed[Band | None] = Field(None, description="a narrow channel")
    codec: Fixed[Codec | None] = Field(None, description="a lossy codec")
    volume: Fixed[Volume | None] = Field(None, description="louder or quieter")
    spec: Fixed[Spec | None] = Field(None, description="SpecAugment on the features")

    @property
    def given(self) -> list[str]:
        """Names of the kinds that are set, in the order in which they are done."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    @property
    def slower(self) -> list[float]:
        """Factors of speed that make a clip longer, the slowest first."""
        if self.speed is None or not self.speed.p:
            return []
        return sorted(factor for factor in self.speed.factors if factor < 1)
