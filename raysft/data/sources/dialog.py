"""Spoken dialogs, turn by turn: what USDM learns to answer by.

    {"id": "d1", "turns": [{"speaker": "A", "text": "Hi.", "units": [3, 17]},
                           {"speaker": "B", "text": "Hello!", "wav": "d1_1.wav"}]}
    {"id": "q1", "user_text": "Hi.", "user_units": "3 17", "agent_text": "Hello!",
     "agent_units": "4 4"}                                            a pair as it is

or DailyTalk's folder: metadata.txt (`0_1_d12|...|TEXT|...`), data/12/0_1_d12.wav, and, where they
are there, its units in data/12/0_1_d12_unit.txt. Without units those of the clip are made
(data.speech_tokens). Each turn is answered by the next: turns 0 and 1, 1 and 2, and so on are an
example each. A dialog in which one speaker has two turns in a row is left out by name: who answers
there is not the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from raysft import stores
from raysft.config.schema import Source
from raysft.data import scripts
from raysft.data.example import ASSISTANT, Audio, Example, Part, Turn, Units
from raysft.data.sources import json_lines
from raysft.data.sources.base import (
    Split,
    clip_path,
    default_id,
    id_field,
    kind,
    load_record,
    text_field,
)
from raysft.data.sources.fields import refuse_unread
from raysft.data.sources.layout import LISTED, Layout, fault, refuse_fault
from raysft.data.sources.lines import lines
from raysft.errors import BadExample
from raysft.json_types import Json, JsonObject

_META = "metadata.txt"
_NAME = re.compile(r"(\d+)_([^_|]+)_d([^_|]+)")
_CLIPS = ("wav", "audio", "wav_path", "audio_path")
_UNITS = ("units", "speech_token")
_TWICE = "one speaker twice"


class Dialog(Layout):
    """The format `dialog`."""

    name = "dialog"
    rank = -1  # before those that read a clip and a text
    describe = "spoken dialogs (USDM): JSON lines of turns or of pairs, or DailyTalk's folder"

    def sniff(self, path: Path) -> bool:
        """Whether it is DailyTalk's folder or list, or a record has turns of speech or a pair."""
        if stores.is_dir(path) or path.name == _META:
            meta = path / _META if stores.is_dir(path) else path
            first = next(iter(lines(meta)), (0, ""))[1] if stores.is_file(meta) else ""
            return _NAME.fullmatch(first.partition("|")[0].strip()) is not None
        return any(map(_is_dialog, json_lines.first_objects(path)))

    def files(self, path: Path, split: Split) -> list[Path]:
        """The list of turns, or the lines."""
        return [path / _META if stores.is_dir(path) else path]

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """DailyTalk's units lie beside its clips: it is always listed."""
        return None if file.name == _META else []

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A pair of turns each, or a dialog that is left out."""
        found = _dailytalk(file) if file.name == _META else _json_dialogs(file)
        for name, at, turns, wrong in found:
            if wrong:
                yield fault(name, wrong, at)
            elif len(turns) < 2:
                yield fault(name, "is a dialog of one turn: nobody answers", at)
            elif (twice := _twice(turns)) is not None:
                yield {
                    **fault(
                        name,
                        f"is a dialog in which speaker {turns[twice]['speaker']} has two turns in "
                        f"a row ({twice + 1} and {twice + 2})",
                        at,
                    ),
                    "kind": _TWICE,
                }
            else:
                own = len(turns) == 2
                for number, pair in enumerate(pairwise(turns)):
                    label = name if own else f"{name}.{number}"
                    yield {LISTED: 1, "id": label, "pair": list(pair), "at": at}

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of a listed pair."""
        record = load_record(raw)
        if "fault" in record and record.get("kind"):
            at = f" ({record['at']})"
            raise BadExample(f"{record['fault']}{at}", record["kind"], record.get("id"))
        refuse_fault(record)
        if LISTED not in record:
            raise BadExample("is no record of a listing", "malformed record")
        try:
            user, agent = record["pair"]
            (heard, asked), (spoken, said) = _turn(user, file), _turn(agent, file)
        except BadExample as error:
            at = f" ({record['at']})" if record.get("at") else ""
            raise BadExample(f"{error}{at}", error.kind, record.get("id")) from None
        turns = (Turn("user", (heard, asked)), Turn(ASSISTANT, (said, spoken)))
        name, own = id_field(record, file, line), task or scripts.DIALOG
        return Example(name, own, (), (), turns=turns, script=scripts.DIALOG)


def _is_dialog(record: JsonObject) -> bool:
    if any(f"user_{name}" in record for name in (*_UNITS, *_CLIPS)):
        return "agent_text" in record or "user_text" in record
    turns = record.get("turns")
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and any(name in first for name in (*_UNITS, *_CLIPS))


_Found = tuple[str, str, list[JsonObject], str]
"""Id, place for messages, turns, and what is wrong with it ("": nothing)."""


def _json_dialogs(file: Path) -> Iterator[_Found]:
    for item in json_lines.items(file):
        name, at = default_id(file, item.line), f"{file.name}:{item.line}"
        try:
            if item.raw is None:
                raise BadExample(item.error or "")
            record = load_record(item.raw)
            name = id_field(record, file, item.line)
            yield name, at, _turns(record), ""
        except BadExample as error:
            yield name, at, [], str(error)


def _turns(record: JsonObject) -> list[JsonObject]:
    """Raises BadExample for turns that are none, and for fields that nothing reads."""
    if "turns" not in record:
        turns: Json = [
            {name[len(who) :]: value for name, value in record.items() if name.startswith(who)}
            for who in ("user_", "agent_")
        ]
        rest = {k: v for k, v in record.items() if not k.startswith(("user_", "agent_"))}
    else:
        turns = record["turns"]
        rest = {name: value for name, value in record.items() if name != "turns"}
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadExample(
            f"field 'turns' is {kind(turns)}, expected a list of objects", "malformed record"
        )
    refuse_unread(rest, frozenset(["id"]))
    for turn in turns:
        refuse_unread(turn, frozenset(["speaker", "text", *_UNITS, *_CLIPS]))
    return turns


def _dailytalk(file: Path) -> Iterator[_Found]:
    """Dialogs in the order in which they begin; a line that is none is one that is left out."""
    dialogs: dict[str, list[tuple[int, JsonObject]]] = {}
    for number, line in lines(file):
        first, *fields = line.split("|")
        name = _NAME.fullmatch(first.strip())
        if name is None or len(fields) < 2:
            at = f"{file.name}:{number}"
            yield first[:60], at, [], "is no turn_speaker_dDIALOG|...|text|..."
            continue
        turn, speaker, dialog = int(name[1]), name[2], name[3]
        clip = f"data/{dialog}/{name[0]}.wav"
        beside = file.parent / "data" / dialog / f"{name[0]}_unit.txt"
        told: JsonObject = {"speaker": speaker, "text": fields[-2], "wav": clip}
        if stores.is_file(beside):
            told["units"] = " ".join(text for _, text in lines(beside))
        dialogs.setdefault(dialog, []).append((turn, told))
    for dialog, turns in dialogs.items():
        turns.sort(key=lambda one: one[0])
        numbers = [number for number, _ in turns]
        wrong = ""
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            wrong = f"is a dialog of which turns are missing or twice there ({numbers})"
        yield f"d{dialog}", file.name, [told for _, told in turns], wrong


def _twice(turns: list[JsonObject]) -> int | None:
    """The first turn whose speaker has the next one too. Where none has a speaker they take
    turns."""
    named = [turn.get("speaker") for turn in turns]
    pairs = enumerate(pairwise(named))
    return next((at for at, (a, b) in pairs if a is not None and a == b), None)


def _turn(turn: JsonObject, file: Path) -> tuple[Part, str]:
    """Units, or the clip, and the text."""
    text = text_field(turn, "text")
    units = next((name for name in _UNITS if turn.get(name)), None)
    if units is not None:
        return Units(tuple(numbers(turn[units], units))), text
    clip = next((name for name in _CLIPS if name in turn), None)
    if clip is None:
        raise BadExample(
            f"a turn has neither units ({', '.join(_UNITS)}) nor a clip ({', '.join(_CLIPS)}); "
            f"fields found: {', '.join(sorted(turn))}",
            "malformed record",
        )
    return Audio(clip_path(text_field(turn, clip), file)), text


def numbers(value: Json, name: str) -> list[int]:
    """Units as a list or a text of numbers. Raises BadExample."""
    given = value.split() if isinstance(value, str) else value
    try:
        if not isinstance(given, list) or not given:
            raise ValueError
        if any(isinstance(one, bool | float) for one in given):
            raise ValueError
        return [int(one) for one in given]
    except (TypeError, ValueError):
        raise BadExample(
            f"field {name!r} is {str(value)[:60]!r}, expected whole numbers", "malformed record"
        ) from None


FORMAT = Dialog()
