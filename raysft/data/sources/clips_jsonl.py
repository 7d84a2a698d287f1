"""JSON lines of a clip and its text under the names that most people give them.

    {"audio_path": "a.wav", "text": "hello", "speaker_id": "s1", "utt_id": "u1"}
    {"file_name": "a.wav", "transcription": "hello"}

Step-Audio's preparation (audio_path, text, speaker_id, utt_id) and the metadata.jsonl of Hugging
Face's audio folders are of this kind.
"""

from __future__ import annotations

from raysft.data.sources.fielded import Fielded
from raysft.json_types import JsonObject


class ClipsJsonl(Fielded):
    """The format `clips_jsonl`."""

    name = "clips_jsonl"
    rank = 2
    describe = "JSON lines with audio_path (path, file_name, audio) and text (sentence, ...)"
    audio = ("audio_path", "path", "file_name", "audio", "audio_file", "file")
    said = ("text", "transcript", "transcription", "sentence")
    names = ("id", "utt_id", "utt")
    speakers = ("speaker", "speaker_id", "spk")
    length = "duration"

    def tells(self, record: JsonObject) -> bool:
        """A clip's path and a text, and none of what makes it a conversation."""
        others = {
            "messages",
            "conversations",
            "conversation",
            "instruction",
            "query",
            "annotations",
        }
        return (
            not others & record.keys()
            and any(isinstance(record.get(name), str) for name in self.audio)
            and any(isinstance(record.get(name), str) for name in self.said)
        )


FORMAT = ClipsJsonl()
