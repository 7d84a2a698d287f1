"""Fields of a record that a format does not read: harmless, or a reason to refuse the record.

Most are metadata (speaker, language, source, sample rate, quality, ...) and stay unread. Refused,
by name, is what would make training wrong without a word:

    a part of a clip    offset, startTime, clip_end, channel, ..., also inside of an object or a
                        list: the whole clip would be read
    audio               a field of audio's name, or that names an audio file: it would not be heard
    pictures            image, images, video, videos
    what else is said   messages, conversations, system, history, ...: it would not be learnt

A field counts where it holds something: null, "", [], {} and an offset or start of 0 do not. What
is put below `metadata` is never read and never refused.
"""

from __future__ import annotations

import functools
import re
from pathlib import PurePath

from raysft.errors import BadExample
from raysft.json_types import JsonObject

METADATA = "metadata"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of a name with one of these words, nothing else but words of the second kind: a part's edge.
# `end_of_speech`, `original_start` and the like tell about the clip.
_EDGES = _words(
    "start begin stop end offset onset seek starttime endtime begintime stoptime tstart tend "
    "stime etime starts ends begins offsets onsets"
)
_BESIDE = _words(
    "audio clip wav wave sound seg segment chunk utt utterance cut time timestamp ts t at s sec "
    "secs second seconds ms msec millis millisecond milliseconds us ns sample samples frame frames "
    "trim crop sub region interval span range window"
)
# These have both edges in one value: two numbers, an object with edges, or a list of such.
_EXTENTS = _words(
    "region regions interval intervals span spans range ranges window windows time times "
    "timestamp timestamps segment segments bounds trim crop cut cuts slice"
)
_EXTENT = _words("segment segments timestamp timestamps time_range")  # here a number alone counts
# Where each word, phone or pause of the whole clip lies is no part of it.
_ALIGNED = _words(
    "word words phone phones phoneme phonemes token tokens char chars character characters "
    "syllable syllables alignment alignments aligned vad pause pauses silence silences event events"
)
_LENGTHS = _words("duration dur length")
_CHANNEL = _words("channel channels chan ch")
_BESIDE_CHANNEL = _words(
    "audio clip wav speaker id idx index selector selected select used use side number left right"
)
_COUNTS = frozenset(["channels"])  # a number here says how many there are
_DIGIT = re.compile(r"[-+]?[.,]?[0-9]")
_DATE = re.compile(r"[0-9]{4}([-/.])[0-9]{1,2}\1[0-9]{1,2}")
_CLOCK = re.compile(r"[0-9]+:[0-9]{2}(?::[0-9]{2})?(?:[.,][0-9]+)?")
_ONE_CHANNEL = re.compile(
    r"(?:(?:ch|chan|channel)[\s_-]*)?(?:[0-9]+|[a-d]|l|r|left|right)", re.IGNORECASE
)
_PICTURES = _words("image images video videos image_path video_path")
_SAID = _words(
    "messages conversations conversation dialog dialogue turns history system query response "
    "question answer context instruction prompt chosen rejected rejected_response target "
    "completion reasoning reasoning_content thinking"
)
_AUDIO_WORDS = _words("audio audios wav wavs speech sound sounds recording clip mp3 flac")
# A name that ends so means the thing itself; `audio_id`, `speech_rate` and the like tell about it.
_AUDIO_ENDS = _AUDIO_WORDS | _words(
    "path paths file files filepath filename url urls uri uris bytes array data"
)
_AUDIO_FILE = re.compile(
    r"\.(?:wav|flac|mp3|ogg|oga|opus|m4a|aac|mp4|webm|aiff?|aifc|au|snd|sph|nist|w64|rf64|caf|amr"
    r"|wma|gsm|ark(?::\d+)?|pcm)$|^data:audio/",
    re.IGNORECASE,
)
# `<Image>` is left to those who learn to write programs.
_PLACEHOLDER = re.compile(
    r"<(?:(audio|speech|sound|image|video)(?:_?[0-9]+)?"
    r"|\|(?i:(audio|speech|sound|image|vision|video)(?:_?[0-9]+|_[a-z]+)?)\|)>"
)
# What an object says of itself, as in {"type": "audio", "url": ...}.
_TYPES = _words("type kind modality mime mime_type mimetype media_type format")
_AUDIO_TYPE = re.compile(r"(?:input_)?audio(?:$|[_/])", re.IGNORECASE)
_PICTURE_TYPE = re.compile(r"(?:input_)?(?:image|video)(?:$|[_/])", re.IGNORECASE)


def refuse_unread(record: JsonObject, read: frozenset[str], clip: str | None = None) -> None:
    """Raise BadExample where `record` has a field that is not among `read` and not harmless.

    clip: the path of the clip that is read: a field that names the same file is harmless.
    """
    for name, value in record.items():
        if name in read or name == METADATA or value is None:
            continue
        if isinstance(value, str | list | dict) and not value:
            continue
        try:
            what = _wrong(name, value, read, clip)
        except RecursionError:
            what = "is nested too deeply to be looked through"
        if what:
            raise BadExample(
                f"field {name!r} {what}; if it is only a note, put it below {METADATA!r}",
                "malformed record",
            )


def _wrong(name: str, value: object, read: frozenset[str], clip: str | None) -> str:
    """What a field that is not read would make wrong; "" for metadata."""
    plain, kind = _kind(name)
    if (kind == "part" and _is_part(plain, value)) or _has_part(plain, value):
        return "says which part of a clip is meant, and only whole clips are read: cut the clip"
    if kind == "channel" and _is_channel(plain, value):
        return "says which channel is meant, and channels are mixed: write that channel alone"
    if kind == "pictures" or _holds(value, _PICTURE_TYPE):
        return "names pictures, which are not read: leave such records out"
    if kind == "said" and not isinstance(value, bool):
        return f"is text that would not be learnt ({', '.join(sorted(read))} are read)"
    if _holds(value, _AUDIO_TYPE) or _is_audio(plain, value, clip):
        return f"names audio ({_short(value)}) that would not be heard"
    return ""


@functools.lru_cache(maxsize=4096)
def _kind(name: str) -> tuple[str, str]:
    """A field's name in one spelling, and which of the kinds above it may be of ("": metadata)."""
    found = _split(name)
    plain, words = "_".join(found), set(found)
    if plain in _EXTENT or _has(words, _EDGES, _BESIDE):
        return plain, "part"
    if _has(words, _CHANNEL, _BESIDE_CHANNEL):
        return plain, "channel"
    kinds = {"pictures": _PICTURES, "said": _SAID}
    return plain, next((kind for kind, names in kinds.items() if plain in names), "")


def _split(name: str) -> list[str]:
    """The words of a name: of start_time, startTime, start-time and START TIME the same."""
    apart = re.sub(r"([a-z0-9])(?=[A-Z])", r"\1_", name)
    return [word for word in re.split(r"[^a-z0-9]+", apart.lower()) if word]


def _has(words: set[str], some: frozenset[str], beside: frozenset[str]) -> bool:
    return bool(words & some) and words <= some | beside


@functools.lru_cache(maxsize=4096)
def _names_audio(name: str) -> bool:
    words = name.split("_")
    return bool(_AUDIO_WORDS & set(words)) and words[-1] in _AUDIO_ENDS


def names_audio_file(text: str) -> bool:
    """Whether a text ends as the name of an audio file does."""
    return _AUDIO_FILE.search(text.strip()) is not None


def refuse_placeholders(text: str, name: str) -> None:
    """Raise BadExample where a text has a place for audio (<audio>) that nothing fills."""
    if found := _PLACEHOLDER.search(text):
        what = (found[1] or found[2]).lower()
        raise BadExample(
            f"field {name!r} holds {found[0]}, a place for {what} that is not read in this format",
            "malformed record",
        )


def stated_seconds(duration: object) -> float | None:
    """What a record's `duration` says the clip lasts; None where it is no number of seconds."""
    if isinstance(duration, bool) or not isinstance(duration, int | float | str):
        return None
    try:
        seconds = float(duration)
    except (ValueError, OverflowError):
        return None
    return seconds if 0 < seconds < 1e6 else None


def check_duration(stated: float | None, seconds: float) -> None:
    """Raise BadExample where a clip is longer than its record says: a part of it is meant.

    Rounded figures are taken as such (3 s may be 3.9, 3.2 s 3.3), and 1% is let pass. A shorter
    clip is no such case: figures from before silence was cut off are common.
    """
    if stated is None:
        return
    decimals = repr(stated).partition(".")[2]
    grain = 1.0 if decimals == "0" else 10.0 ** -len(decimals) if "e" not in decimals else 0.0
    if seconds > stated * 1.01 + grain + 0.05:
        raise BadExample(
            f"field 'duration' says {stated:g} s, but the clip has {seconds:.2f} s, and only whole "
            "clips are read: cut the clip, or mend the field",
            "malformed record",
        )


def _is_part(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, str):
        text = value.strip()
        if name in _EXTENT:  # a number; else a note (`segment`: "Benchmark", "3a")
            return _CLOCK.fullmatch(text) is not None or _number(text) not in (None, 0)
        if _DIGIT.match(text) is None or _DATE.match(text):
            return False
        return "end" in name or "stop" in name or re.search("[1-9]", text) is not None
    if isinstance(value, int | float):
        return value != 0 or "end" in name or "stop" in name
    return value is not None


def _has_part(name: str, value: object) -> bool:
    """Whether a part of a clip is said inside of a list or an object."""
    if not isinstance(value, list | dict):
        return False
    words = set(name.split("_"))
    if words & _ALIGNED:
        return False
    if isinstance(value, list):
        if _has(words, _EXTENTS, _BESIDE) and len(value) == 2 and all(map(_is_figure, value)):
            return True
        return any(_has_part(name, item) for item in value)
    inside = [(*_kind(key), item) for key, item in value.items() if item is not None]
    edges = [(plain, item) for plain, kind, item in inside if kind == "part"]
    if any(_is_part(plain, item) for plain, item in edges if _is_figure(item)):
        return True
    lengths = [item for plain, _, item in inside if _has({plain}, _LENGTHS, _BESIDE)]
    if edges and any(map(_is_figure, lengths)):
        return True  # from 0 on, so long
    return any(_has_part(plain, item) for plain, _, item in inside)


def _is_figure(value: object) -> bool:
    if isinstance(value, str):
        return _DIGIT.match(value.strip()) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_channel(name: str, value: object) -> bool:
    if isinstance(value, str):
        return _ONE_CHANNEL.fullmatch(value.strip()) is not None
    if isinstance(value, int | float):
        return name not in _COUNTS and not isinstance(value, bool)
    return True


def _is_audio(name: str, value: object, clip: str | None) -> bool:
    named = _names_audio(name)
    if isinstance(value, str):
        found = named or _AUDIO_FILE.search(value.strip()) is not None
        return found and not _same_clip(value, clip)
    if isinstance(value, list):
        return any(_is_audio(name, item, clip) for item in value) or (
            named and any(isinstance(item, int | float) for item in value)  # samples
        )
    if isinstance(value, dict):
        return named or any(
            isinstance(item, str | list | dict) and _is_audio(_kind(key)[0], item, clip)
            for key, item in value.items()
        )
    return False


def _holds(value: object, types: re.Pattern[str]) -> bool:
    """Whether there is an object inside that says to be of one of these types."""
    if isinstance(value, list):
        return any(_holds(item, types) for item in value)
    if not isinstance(value, dict):
        return False
    return any(
        (_kind(key)[0] in _TYPES and types.match(item) is not None)
        if isinstance(item, str)
        else _holds(item, types)
        for key, item in value.items()
    )


def _same_clip(value: str, clip: str | None) -> bool:
    return clip is not None and PurePath(value).name == PurePath(clip).name


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
