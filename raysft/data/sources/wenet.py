"""WeNet's raw lists (`data.list`), and those of west and Touch*: JSON lines with wav and txt.

    {"key": "a1", "wav": "a.wav", "txt": "hello", "start": 1.5, "end": 3.5}

`start` and `end`: seconds, of a part. Lists of tars are `tarred`'s.
"""

from __future__ import annotations

from raysft.data.sources.fielded import Fielded


class Wenet(Fielded):
    """The format `wenet`."""

    name = "wenet"
    describe = "WeNet or west lists: JSON lines with wav, txt, key; lists of tars are tarred"
    told_by = ("wav", "txt")
    audio = ("wav",)
    said = ("txt",)
    names = ("key", "id")
    speakers = ("speaker", "spk")
    start = "start"
    stop = "end"
    length = "duration"


FORMAT = Wenet()
