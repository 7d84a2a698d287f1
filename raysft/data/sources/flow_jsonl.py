"""JSON lines of a clip, its speech tokens and an embedding of its speaker: for a flow decoder.

    {"id": "u1", "wav": "u1.wav", "speech_token": [3, 17, 17, 4], "spk_embedding": [0.1, ...]}

The clip's path is `wav`, `wav_path`, `audio_path` or `path`; a relative one begins at the folder of
the file. `speech_token` may be left out where data.speech_tokens makes them, and `spk_embedding`
(or `utt_embedding`) where the model reads none. `speaker` is a note, and `text`, which is what the
clip says, is for evaluation alone (`evaluate.asr`).
"""

from __future__ import annotations

from pathlib import Path

from raysft import stores
from raysft.data.example import Audio, Example
from raysft.data.sources import json_lines
from raysft.data.sources.base import clip_path, id_field, load_record, text_field
from raysft.data.sources.fields import refuse_unread
from raysft.data.sources.sounding import numbers, sounding, values
from raysft.errors import BadExample

CLIPS = ("wav", "wav_path", "audio_path", "path")
TOKENS = "speech_token"
VOICES = ("spk_embedding", "utt_embedding")
READ = frozenset([*CLIPS, TOKENS, *VOICES, "id", "utt", "text", "speaker", "spk", "task_type"])


class FlowJsonl(json_lines.JsonLines):
    """The format `flow_jsonl`."""

    name = "flow_jsonl"
    describe = "JSON lines with wav, speech_token, spk_embedding: for a flow decoder"

    def sniff(self, path: Path) -> bool:
        """Whether one of the first lines has a clip, and tokens or an embedding."""
        if stores.is_dir(path):
            return False
        for record in json_lines.first_objects(path):
            if any(name in record for name in CLIPS):
                return any(name in record for name in (TOKENS, *VOICES))
        return False

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of one line. Raises BadExample naming what is wrong with it."""
        record = load_record(raw)
        field = next((name for name in CLIPS if name in record), CLIPS[0])
        given = text_field(record, field)
        try:
            path = clip_path(given, file)
        except BadExample as error:
            raise BadExample(f"field {field!r}: {error}", error.kind) from None
        refuse_unread(record, READ, clip=given)
        voice = next((name for name in VOICES if record.get(name)), VOICES[0])
        name = id_field({"id": record.get("id", record.get("utt"))}, file, line)
        speaker, text = record.get("speaker", record.get("spk")), record.get("text")
        return sounding(
            name,
            Audio(path),
            numbers(record, TOKENS),
            values(record, voice),
            task,
            speaker if isinstance(speaker, str) else None,
            text if isinstance(text, str) and text.strip() else None,
        )


FORMAT = FlowJsonl()
