"""FunASR's lists: JSON lines with source (a clip) and target (its text).

    {"key": "a1", "source": "a.wav", "source_len": 90, "target": "hello", "target_len": 4}

A source that is a text and no clip is refused: such lines are another task's.
"""

from __future__ import annotations

from raysft.data.sources.fielded import Fielded
from raysft.data.sources.fields import names_audio_file
from raysft.errors import BadExample
from raysft.json_types import JsonObject


class FunAsr(Fielded):
    """The format `funasr`."""

    name = "funasr"
    describe = "FunASR lists: JSON lines with key, source, target"
    told_by = ("source", "target")
    audio = ("source",)
    said = ("target",)
    names = ("key",)
    languages = ("language", "lang", "text_language")
    harmless = (
        "source_len",
        "target_len",
        "text_language",
        "emo_target",
        "event_target",
        "with_or_wo_itn",
    )

    def tells(self, record: JsonObject) -> bool:
        """Pairs of texts have these names too."""
        return super().tells(record) and ("key" in record or "source_len" in record)

    def paths(self, record: JsonObject) -> list[str]:
        """Of its clip."""
        found = super().paths(record)
        for path in found:
            if not names_audio_file(path):
                raise BadExample(
                    f"field 'source' is {path[:60]!r}, which names no audio file: lines whose "
                    "source is a text are not read; write them as conversations (messages)",
                    "malformed record",
                )
        return found


FORMAT = FunAsr()
