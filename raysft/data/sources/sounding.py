"""What sounds of speech tokens: the example that a flow decoder learns from.

A clip, the tokens that say it, and an embedding of who speaks. Records of a listing carry both as
`flow`, the embedding's float32 values in base64.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import numpy as np

from raysft.data.example import Audio, Example, Units
from raysft.data.sources.base import kind
from raysft.errors import BadExample
from raysft.json_types import JsonObject

TASK = "flow"
"""The task of such examples; an entry that names it asks for tokens and embeddings."""
FLOW = "flow"  # of a listed record


def sounding(
    name: str,
    clip: Audio,
    tokens: Sequence[int],
    voice: Sequence[float],
    task: str | None,
    speaker: str | None = None,
    text: str | None = None,
) -> Example:
    """The example. Where there are no tokens they are to be made of the clip. text: what is said in
    it, for evaluation alone."""
    said = (Units(tuple(tokens)),) if len(tokens) else ()
    own = tuple(voice)
    return Example(name, task or TASK, said, (clip,), text=text, speaker=speaker, voice=own)


def told(tokens: Sequence[int] | None, voice: Sequence[float] | None) -> JsonObject:
    """What a listed record carries of them."""
    values = np.asarray(voice if voice is not None else [], "<f4").ravel()
    packed = base64.b64encode(values.tobytes()).decode()
    return {"tokens": [int(one) for one in tokens or []], "voice": packed}


def of_listed(
    name: str,
    clips: Sequence[Audio],
    record: JsonObject,
    task: str | None,
    speaker: str | None,
    text: str | None,
) -> Example:
    """The example of a listed record. Raises BadExample."""
    if len(clips) != 1:
        several = f"{len(clips)} clips" if clips else "no clip"
        raise BadExample(f"has {several}, and one is to sound", "not one clip")
    try:
        values = np.frombuffer(base64.b64decode(record["voice"], validate=True), "<f4")
    except (KeyError, ValueError, binascii.Error) as error:
        raise BadExample(f"is no record of a listing: {error}", "malformed record") from None
    tokens = numbers(record, "tokens")
    return sounding(name, clips[0], tokens, values.tolist(), task, speaker, text)


def numbers(record: JsonObject, name: str) -> list[int]:
    """A field that is a list of whole numbers, [] where it is not there. Raises BadExample."""
    found = _list(record, name)
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
        raise BadExample(f"field {name!r} is no list of whole numbers", "malformed record")
    return found


def values(record: JsonObject, name: str) -> list[float]:
    """A field that is a list of numbers, [] where it is not there. Raises BadExample."""
    found = _list(record, name)
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in found):
        raise BadExample(f"field {name!r} is no list of numbers", "malformed record")
    return [float(one) for one in found]


def _list(record: JsonObject, name: str) -> list:
    found = record.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise BadExample(f"field {name!r} is {kind(found)}, expected a list", "malformed record")
    return found
