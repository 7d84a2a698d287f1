"""Conversations: `messages` as OpenAI, ms-swift and LLaMA-Factory have them, and ShareGPT's.

    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": "<audio>What is said?"},
                  {"role": "assistant", "content": "Two words."}], "audios": ["a.wav"]}
    {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"},
                                               {"type": "text", "text": "What is said?"}]}, ...]}
    {"conversations": [{"from": "human", "value": "<audio>Hm?"}, {"from": "gpt", "value": "Hm."}],
     "system": "Be brief.", "audios": ["a.wav"]}
    {"query": "<audio>Hm?", "response": "Hm.", "history": [["Q", "A"]], "audios": ["a.wav"]}
    {"instruction": "<audio>Hm?", "input": "", "output": "Hm.", "audios": ["a.wav"]}

Each may have a `chosen` and a `rejected` answer in place of its own: see preferences.py.

A file is a JSON list, {"data": [...]}, one object, or an object a line. A clip is a path (a
relative one begins at the folder of the file), a `data:` URI or base64; of clips beside the text
there is one for each tag `<audio>`, in order; units are written `[Hu7]`. All turns of the assistant
are learnt, or the last (`data.supervise`), but for a message that says so itself (`loss`, `weight`
or `train`: true, false, 1, 0). The task is the entry's, or the record's `task`, else chat. `tools`
and a message's `tool_calls` go to the chat template; other fields are metadata, or refused: see
fields.py.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from raysft import stores
from raysft.data.example import ASSISTANT, Audio, Example, Part, Turn
from raysft.data.sources.base import clip_path, id_field, kind, load_record
from raysft.data.sources.conversations import LISTS, PAIRS, ROLES
from raysft.data.sources.fields import refuse_placeholders, refuse_unread, stated_seconds
from raysft.data.sources.json_files import JsonFiles, first_records
from raysft.data.sources.most_json import split_units
from raysft.data.sources.preferences import Preference, is_pair, looks_like_pair, preference
from raysft.errors import BadExample
from raysft.json_types import Json, JsonObject

TASK = "chat"
TAG = "<audio>"
BESIDE = ("input", *PAIRS.values())
USED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LISTS, ()),
    "query": ("response",),
    "instruction": ("input", "output"),
}
AUDIO = ("audios", "audio")
READ = frozenset([*LISTS, *PAIRS, *PAIRS.values(), *AUDIO])
READ |= {"id", "task", "input", "history", "system", "tools"}
FLAGS = ("loss", "weight", "train", "loss_scale")
IN_MESSAGE = frozenset(["role", "from", "content", "value", "tool_calls", "tool_call_id", *FLAGS])
IN_AUDIO = frozenset(["type", "audio", "audio_url", "url", "path", "input_audio", "format", "data"])
_URI = re.compile(r"data:[^,;]*(?:;[^,;]*)*;base64,")


class Messages(JsonFiles):
    """The format `messages`."""

    name = "messages"
    describe = (
        "JSON (or JSON lines) of conversations: messages or conversations, with audio as <audio> "
        "tags and audios, or as parts of a message"
    )

    def sniff(self, path: Path) -> bool:
        """Whether one of the first records holds a conversation, or a question with clips."""
        if stores.is_dir(path):
            return False
        return any(map(_is_conversation, first_records(path)))

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The conversation of one record. Raises BadExample naming what is wrong with it."""
        record, pair = load_record(raw), None
        if is_pair(record):
            pair = preference(record)
            record = pair.record
        refuse_unread(record, READ)
        clips = _Clips(record, file, line)
        turns = [_turn(message, f"message {n}", clips) for n, message in _messages(record)]
        rejected = None if pair is None else _rejected(pair, turns, clips)
        clips.close()
        if not any(turn.role == ASSISTANT for turn in turns):
            raise BadExample(
                "has no message of the assistant: nothing to learn", "malformed record"
            )
        learnt = [turn for turn in turns if turn.role == ASSISTANT and turn.learnt is not False]
        example = Example(
            id=id_field(record, file, line),
            task=task or _task(record),
            input=(),
            output=(),
            text=_text(learnt[-1]) if learnt else None,
            turns=tuple(turns),
            tools=_tools(record.get("tools"), "tools"),
        )
        if rejected is None:
            return example
        return replace(example, rejected=replace(example, turns=rejected, text=None))


def _rejected(pair: Preference, turns: list[Turn], clips: _Clips) -> tuple[Turn, ...]:
    """The conversation with the rejected answer. turns: with the chosen one."""
    if not pair.chosen or not pair.rejected:
        raise BadExample("one of its chosen and rejected answers is missing", "malformed record")
    before, last = turns[: len(turns) - pair.chosen], turns[-1]
    own = [
        _turn(message, f"message {number} of the rejected answer", clips)
        for number, message in enumerate(pair.rejected, 1)
    ]
    for turn, what in ((last, "chosen"), (own[-1], "rejected")):
        if turn.role != ASSISTANT:
            raise BadExample(
                f"its {what} answer ends in a message of the {turn.role}, expected the assistant's",
                "malformed record",
            )
    return (*before, *own)


def _text(turn: Turn) -> str | None:
    """What an answer is held against; None where a part of the turn is no text."""
    return turn.text or None if all(isinstance(part, str) for part in turn.content) else None


def _is_conversation(record: JsonObject) -> bool:
    """Whether it is one, and no record of another format with something of one beside it."""
    if "wav_path" in record:
        return False
    if looks_like_pair(record):
        return True
    if "output" in record and not _tagged_question(record):
        return False
    return (
        any(record.get(name) and isinstance(record[name], list) for name in LISTS)
        or ("query" in record and "response" in record)
        or _tagged_question(record)
    )


def _tagged_question(record: JsonObject) -> bool:
    asked = (record.get(name) for name in (*PAIRS, "input"))
    tagged = any(isinstance(text, str) and TAG in text for text in asked)
    return tagged and any(record.get(name) for name in AUDIO)


class _Clips:
    """The clips beside the text, handed out one for each tag."""

    def __init__(self, record: JsonObject, file: Path, line: int) -> None:
        self.file, self.line = file, line
        given = [record[name] for name in AUDIO if record.get(name)]
        if len(given) > 1:
            raise BadExample("has both 'audios' and 'audio': leave one", "malformed record")
        items = given[0] if given else []
        self.given: list[Json] = items if isinstance(items, list) else [items]
        self.tags, self.count = 0, 0

    def following(self) -> Audio | None:
        """The clip of the next tag; None where there are no more (see `close`)."""
        self.tags += 1
        if self.tags > len(self.given):
            return None
        return self.of(self.given[self.tags - 1], f"audios[{self.tags - 1}]")

    def close(self) -> None:
        """Raises BadExample where tags and clips are not as many."""
        if self.tags != len(self.given):
            raise BadExample(
                f"has {self.tags} {TAG} tags and {len(self.given)} clips in 'audios': write one "
                "tag where each clip is heard",
                "malformed record",
            )

    def of(self, value: Json, where: str, duration: object = None) -> Audio:
        """What a path, a URI, base64 or an object with one of these means."""
        if isinstance(value, dict):
            refuse_unread(value, IN_AUDIO)
            duration = value.get("duration", duration)
            known = ("path", "url", "audio", "data", "audio_url", "input_audio")
            names = [name for name in known if value.get(name)]
            if len(names) != 1:
                raise BadExample(
                    f"{where} is an object with {' and '.join(names) or 'no clip'}: expected one "
                    f"of {', '.join(known)}",
                    "malformed record",
                )
            inner = value[names[0]]
            if names[0] == "data" and isinstance(inner, str) and not _URI.match(inner):
                inner = f"data:;base64,{inner}"
            return self.of(inner, where, duration)
        if not isinstance(value, str) or not value.strip():
            found = "an empty text" if isinstance(value, str) else kind(value)
            raise BadExample(f"{where} is {found}, expected the path of a clip", "malformed record")
        self.count += 1
        stated = stated_seconds(duration)
        if uri := _URI.match(value):
            name = f"{self.file}:{self.line}, clip {self.count}"
            return Audio(name, stated, bytes=_decoded(value[uri.end() :], where))
        try:
            return Audio(clip_path(value.removeprefix("file://"), self.file), stated)
        except BadExample as error:
            raise BadExample(f"{where}: {error}", "malformed record") from None


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadExample(f"{where} is no base64: {error}", "malformed record") from None


def _messages(record: JsonObject) -> Iterator[tuple[int, JsonObject]]:
    """Numbered from 1, with the system prompt and the history that stand beside them."""
    kinds = [name for name in (*LISTS, *PAIRS) if record.get(name)]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        raise BadExample(
            f"expected one of {', '.join((*LISTS, *PAIRS))}, found {found}", "malformed record"
        )
    beside = [name for name in BESIDE if record.get(name) and name not in USED[kinds[0]]]
    if beside:
        raise BadExample(
            f"field {beside[0]!r} beside {kinds[0]!r} would not be learnt: leave one of them",
            "malformed record",
        )
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for question, answer in _pairs(record.get("history") or [], "history"):
        messages += [_said("user", question), _said(ASSISTANT, answer)]
    name = kinds[0]
    if name in PAIRS:
        asked = record[name]
        if name == "instruction" and record.get("input"):
            asked = f"{asked}\n{record['input']}"
        messages += [_said("user", asked), _said(ASSISTANT, record.get(PAIRS[name]))]
    else:
        if not isinstance(record[name], list):
            raise BadExample(
                f"field {name!r} is {kind(record[name])}, expected a list", "malformed record"
            )
        for item in record[name]:
            if not isinstance(item, dict):
                raise BadExample(
                    f"field {name!r} holds {kind(item)}, expected messages", "malformed record"
                )
            if name == "conversation" and "human" in item:
                refuse_unread(item, frozenset(["human", "assistant"]))
                messages.append(_said("user", item["human"]))
                messages.append(_said(ASSISTANT, item.get("assistant")))
            else:
                messages.append(item)
    yield from enumerate(messages, 1)


def _said(role: str, text: Json) -> JsonObject:
    return {"role": role, "content": text}


def _pairs(value: Json, name: str) -> Iterator[tuple[Json, Json]]:
    if not isinstance(value, list) or not all(isinstance(p, list) and len(p) == 2 for p in value):
        raise BadExample(
            f"field {name!r}: expected a list of [question, answer]", "malformed record"
        )
    yield from ((pair[0], pair[1]) for pair in value)


def _turn(message: JsonObject, where: str, clips: _Clips) -> Turn:
    refuse_unread(message, IN_MESSAGE)
    said = [name for name in ("role", "from") if name in message]
    role = message[said[0]] if len(said) == 1 else None
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        found = repr(role) if isinstance(role, str) else "no role"
        raise BadExample(f"{where} has {found}; roles: {', '.join(ROLES)}", "malformed record")
    plain = ROLES[role.strip().lower()]
    learnt = _flag(message, where)
    if learnt is not None and plain != ASSISTANT:
        if learnt:
            raise BadExample(
                f"{where} is of the {plain}, and only the assistant's are learnt",
                "malformed record",
            )
        learnt = None
    calls = _tools(message.get("tool_calls"), f"{where}: tool_calls")
    contents = [message[name] for name in ("content", "value") if message.get(name) is not None]
    if len(contents) > 1 or not (contents or calls):
        raise BadExample(f"{where} has {len(contents)} contents, expected one", "malformed record")
    content = tuple(_content(contents[0] if contents else "", where, clips))
    return Turn(plain, content, learnt, calls)


def _flag(message: JsonObject, where: str) -> bool | None:
    given = {name: message[name] for name in FLAGS if message.get(name) is not None}
    if len(given) > 1:
        raise BadExample(f"{where} has {' and '.join(given)}: leave one", "malformed record")
    for name, value in given.items():
        if value not in (True, False, 0, 1):
            raise BadExample(
                f"{where}: {name} is {value!r}, expected true or false", "malformed record"
            )
        return bool(value)
    return None


def _content(content: Json, where: str, clips: _Clips) -> Iterator[Part]:
    if isinstance(content, str):
        yield from _tagged(content, where, clips)
        return
    if not isinstance(content, list):
        raise BadExample(
            f"{where}: content is {kind(content)}, expected a text or a list", "malformed record"
        )
    for item in content:
        if isinstance(item, str):
            yield from _tagged(item, where, clips)
        elif not isinstance(item, dict):
            raise BadExample(f"{where}: content holds {kind(item)}", "malformed record")
        elif item.get("type", "text") == "text" and "text" in item:
            refuse_unread(item, frozenset(["type", "text"]))
            if not isinstance(item["text"], str):
                raise BadExample(
                    f"{where}: text is {kind(item['text'])}, expected a text", "malformed record"
                )
            yield from _tagged(item["text"], where, clips)
        elif item.get("type", "audio") in ("audio", "input_audio", "audio_url"):
            yield clips.of(item, f"{where}: content")
        else:
            raise BadExample(
                f"{where}: content of type {item.get('type')!r}; text and audio are read",
                "malformed record",
            )


def _tagged(text: str, where: str, clips: _Clips) -> Iterator[Part]:
    """Text cut at its tags, with their clips between."""
    first, *rest = text.split(TAG)
    refuse_placeholders("".join((first, *rest)), where)
    yield from _with_units(first, where)
    for piece in rest:
        clip = clips.following()
        if clip is not None:
            yield clip
        yield from _with_units(piece, where)


def _with_units(text: str, where: str) -> Iterable[Part]:
    """Text cut at its units, written `[Hu7]` as in the format most_json."""
    if "[Hu" in text:
        return split_units(text, where)
    return (text,) if text else ()


def _tools(value: Json, where: str) -> str:
    """A list, also where it is given as the JSON of one; "" for none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadExample(f"{where}: no JSON: {error}", "malformed record") from None
    if not value:
        return ""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadExample(f"{where}: expected a list of objects", "malformed record")
    return json.dumps(value, ensure_ascii=False)


def _task(record: JsonObject) -> str:
    task = record.get("task")
    if task is None:
        return TASK
    if not isinstance(task, str) or not task.strip():
        raise BadExample("field 'task' is not a text", "malformed record")
    return task.strip().lower()


FORMAT = Messages()
