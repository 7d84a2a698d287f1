"""Fields of a record that a format does not read: harmless, or a reason to refuse the record.

Most are metadata (speaker, language, source, sample rate, quality, ...) and stay unread. Refused,
by name, is what would make training wrong without a word:

    a part of a clip    offset, start, end, channel, ...: the whole clip would be read
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
from typing import Any

from raysft.errors import BadExample

METADATA = "metadata"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PARTS = _words(
    "offset start begin stop end onset start_time end_time begin_time stop_time start_s end_s "
    "start_sec end_sec start_seconds end_seconds start_ms end_ms start_offset end_offset "
    "offset_s offset_ms seg_start seg_end segment_start segment_end segment_start_time "
    "segment_end_time audio_start audio_end audio_offset start_sample end_sample start_frame "
    "end_frame frame_offset sample_offset timestamp timestamps time_range segment segments "
    "chunk_start chunk_end"
)
_CHANNELS = _words("channel channels channel_id channel_selector selected_channel")
_COUNTS = frozenset(["channels"])  # a number here says how many there are
_PICTURES = _words("image images video videos image_path video_path")
_SAID = _words(
    "messages conversations conversation dialog dialogue turns history system query response "
    "question answer context instruction prompt chosen rejected rejected_response"
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
_PLACEHOLDER = re.compile(r"<(audio|image|video)>")


def refuse_unread(record: dict[str, Any], read: frozenset[str], clip: str | None = None) -> None:
    """Raise BadExample where `record` has a field that is not among `read` and not harmless.

    clip: the path of the clip that is read: a field that names the same file is harmless.
    """
    for name, value in record.items():
        if name in read or name == METADATA or value is None:
            continue
        if isinstance(value, str | list | dict) and not value:
            continue
        plain, kind = _kind(name)
        if kind == "part" and _is_part(plain, value):
            what = "says which part of a clip is meant, and only whole clips are read: cut the clip"
        elif kind == "channel" and _is_channel(plain, value):
            what = "says which channel is meant, and channels are mixed: write that channel alone"
        elif kind == "pictures":
            what = "names pictures, which are not read: leave such records out"
        elif kind == "said":
            what = f"is text that would not be learnt ({', '.join(sorted(read))} are read)"
        elif not isinstance(value, int | float) and _is_audio(plain, value, clip):
            what = f"names audio ({_short(value)}) that would not be heard"
        else:
            continue
        raise BadExample(f"field {name!r} {what}; if it is only a note, put it below {METADATA!r}")


@functools.lru_cache(maxsize=4096)
def _kind(name: str) -> tuple[str, str]:
    """A field's name in one spelling, and which of the kinds above it may be of ("": metadata)."""
    plain = name.strip().lower().replace("-", "_")
    kinds = {"part": _PARTS, "channel": _CHANNELS, "pictures": _PICTURES, "said": _SAID}
    return plain, next((kind for kind, names in kinds.items() if plain in names), "")


@functools.lru_cache(maxsize=4096)
def _names_audio(name: str) -> bool:
    words = [word for word in re.split(r"[^a-z0-9]+", name) if word]
    return bool(_AUDIO_WORDS & set(words)) and words[-1] in _AUDIO_ENDS


def refuse_placeholders(text: str, name: str) -> None:
    """Raise BadExample where a text has a place for audio (<audio>) that nothing fills."""
    if found := _PLACEHOLDER.search(text):
        raise BadExample(
            f"field {name!r} holds {found[0]}, a place for {found[1]} that is not read in this "
            "format"
        )


def stated_seconds(duration: Any) -> float | None:
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
            "clips are read: cut the clip, or mend the field"
        )


def _is_part(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return value != 0 or "end" in name or "stop" in name
    if isinstance(value, str):  # a number as text; else a note (`segment`: "Benchmark")
        try:
            return float(value) != 0 or "end" in name
        except ValueError:
            return re.fullmatch(r"\d+:\d\d(?::\d\d)?(?:[.,]\d+)?", value.strip()) is not None
    return True


def _is_channel(name: str, value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("left", "right", "l", "r") or value.strip().isdigit()
    if isinstance(value, int | float):
        return name not in _COUNTS and not isinstance(value, bool)
    return True


def _is_audio(name: str, value: Any, clip: str | None) -> bool:
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
            isinstance(item, str | list | dict) and _is_audio(str(key).lower(), item, clip)
            for key, item in value.items()
        )
    return False


def _same_clip(value: str, clip: str | None) -> bool:
    return clip is not None and PurePath(value).name == PurePath(clip).name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
