"""Emilia's lists: JSON lines with wav, text, duration, speaker, language and dnsmos.

{"id": "a1", "wav": "a.mp3", "text": "hello", "duration": 1.5, "speaker": "s1", "language": "en"}
"""

from __future__ import annotations

from raysft.data.sources.fielded import Fielded


class Emilia(Fielded):
    """The format `emilia`."""

    name = "emilia"
    describe = "Emilia lists: JSON lines with wav, text, duration, speaker"
    told_by = ("wav", "text")
    audio = ("wav",)
    said = ("text",)
    names = ("id", "_id")
    length = "duration"


FORMAT = Emilia()
