"""Speech in a voice that is shown, and speech that is changed: what Step-Audio-EditX's language
model learns.

    {"id": "c1", "text": "To be said.", "speech_token": [3, 17, ...], "spk": "anna",
     "prompt_text": "What is heard.", "prompt_speech_token": [4, 9, ...]}          clone
    {"id": "e1", "instruction": "Make it happier.", "speech_token": [...],
     "prompt_speech_token": [...]}                                                 edit

Tokens as preparations write them: of two codebooks in one list, two of the first and three of the
second, which count on from the first. In place of tokens a clip (`wav`, `prompt_wav`), of which
data.speech_tokens makes them. The task is clone or edit, by whether there is an `instruction`.
"""

from __future__ import annotations

from pathlib import Path

from raysft import stores
from raysft.data import scripts
from raysft.data.example import ASSISTANT, Audio, Example, Part, Turn, Units
from raysft.data.sources import json_lines
from raysft.data.sources.base import clip_path, id_field, load_record, text_field
from raysft.data.sources.dialog import numbers
from raysft.data.sources.fields import refuse_unread
from raysft.data.sources.sounding import values
from raysft.errors import BadExample
from raysft.json_types import JsonObject

_TOKENS, _CLIP = "speech_token", "wav"
_VOICES = ("spk_embedding", "utt_embedding")
READ = frozenset(
    [
        *("id", "utt", "text", "spk", "speaker", "instruction", "prompt_text", "duration"),
        *(_TOKENS, _CLIP, f"prompt_{_TOKENS}", f"prompt_{_CLIP}", *_VOICES),
    ]
)


class Voices(json_lines.JsonLines):
    """The format `voices`."""

    name = "voices"
    rank = -1  # before those that read a clip and a text
    describe = "JSON lines with prompt_speech_token, prompt_text and text, or an instruction (Step)"

    def sniff(self, path: Path) -> bool:
        """Whether a record has a prompt's tokens or clip."""
        if stores.is_dir(path):
            return False
        prompts = (f"prompt_{_TOKENS}", f"prompt_{_CLIP}")
        return any(
            any(name in record for name in prompts) for record in json_lines.first_objects(path)
        )

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of one line. Raises BadExample naming what is wrong with it."""
        record = load_record(raw)
        refuse_unread(record, READ)
        name = id_field({"id": record.get("id", record.get("utt"))}, file, line)
        speaker = record.get("spk", record.get("speaker"))
        speaker = speaker if isinstance(speaker, str) else None
        heard = _spoken(record, "prompt_", file)
        answer = Turn(ASSISTANT, (_spoken(record, "", file),)) if _says(record) else None
        last = () if answer is None else (answer,)
        if "instruction" in record:
            asked = text_field(record, "instruction")
            turns = (Turn("user", (asked, heard)), *last)
            script = scripts.EDIT
        else:
            shown = Turn("system", (text_field(record, "prompt_text"), heard))
            turns = (shown, Turn("user", (text_field(record, "text"),)), *last)
            script = scripts.CLONE
        voice = next((key for key in _VOICES if record.get(key)), _VOICES[0])
        return Example(
            name,
            task or script,
            (),
            (),
            turns=turns,
            speaker=speaker,
            voice=tuple(values(record, voice)),
            script=script,
        )


def _says(record: JsonObject) -> bool:
    return any(record.get(name) for name in (_TOKENS, _CLIP))


def _spoken(record: JsonObject, whose: str, file: Path) -> Part:
    tokens = f"{whose}{_TOKENS}"
    if record.get(tokens):
        return Units(tuple(numbers(record[tokens], tokens)))
    if f"{whose}{_CLIP}" not in record:
        raise BadExample(f"has neither {tokens} nor {whose}{_CLIP}", "malformed record")
    return Audio(clip_path(text_field(record, f"{whose}{_CLIP}"), file))


FORMAT = Voices()
