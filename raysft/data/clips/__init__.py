"""Clips as files: which container a file is, how long it is, and its samples.

Stands under audio.py. A container is a row here and a module: it says from a few bytes how long a
file is, or that only decoding tells, and decodes it to its end. The rule: what a header merely
guesses is never believed, and what it promises is held against what is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from raysft.data.clips import chunked, flac, mp3, ogg, pyav
from raysft.data.clips.file import File, Track, decoding, sound
from raysft.errors import BadExample

_HEAD = 64
# What libsndfile calls them.
_READ = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "NIST", "CAF", "FLAC", "OGG", "MP3")
_BY_PATTERN: tuple[tuple[bytes, Callable[[File], Track]], ...] = (
    *(
        (magic, partial(chunked.track, find=chunked.riff))
        for magic in (b"RIFF....WAVE", b"RIFX....WAVE", b"RF64....WAVE", b"BW64....WAVE")
    ),
    (rb"riff\x2e\x91\xcf\x11", partial(chunked.track, find=chunked.wave64)),
    *(
        (magic, partial(chunked.track, find=chunked.aiff))
        for magic in (b"FORM....AIFF", b"FORM....AIFC")
    ),
    (rb"\.snd", partial(chunked.track, find=chunked.au)),
    (rb"dns\.", partial(chunked.track, find=chunked.au)),
    (b"NIST_1A", partial(chunked.track, find=chunked.sphere)),
    (rb"caff\x00\x01", partial(chunked.track, find=chunked.caf)),
    (b"OggS", ogg.track),
)
# By the first bytes.
_OPENERS = [(re.compile(pattern, re.DOTALL), opener) for pattern, opener in _BY_PATTERN]


def open_track(file: File) -> Track:
    """The sound in a file, nothing of it decoded.

    Raises BadExample: no audio, of a format that is not read, cut off.
    """
    with decoding(file.path):
        return _open(file)


def _open(file: File) -> Track:
    head = file.read(0, _HEAD)
    for pattern, opener in _OPENERS:
        if pattern.match(head):
            return opener(file)
    start = mp3.after_tags(file, 0)  # tags may stand before FLAC and AAC too
    head = file.read(start, _HEAD)
    if head.startswith(b"fLaC"):
        return flac.track(file, start)
    if mp3.first_frame(head):
        return mp3.track(file, start, file.size)
    if (kind := pyav.name(head)) is not None:
        return pyav.track(file, kind)
    if start or file.path.lower().endswith((".mp3", ".mp2", ".mpga")):
        return mp3.track(file, start, file.size)
    with sound(file.path, file.view()) as opened:
        if opened.format in _READ:
            raise BadExample(
                f"{file.path}: not audio that can be read (its header is damaged)", "not audio"
            )
        raise BadExample(
            f"{file.path}: not audio that is read here: {opened.format_info}, which does not tell "
            "whether it is whole: convert the clip to wav or flac",
            "not audio",
        )
