"""Conversations with two answers of which one is preferred, for the format `messages`.

    {"messages": [...], "chosen": "Yes.", "rejected": "No."}        texts, messages, lists of them
    {"prompt": "What?", "chosen": "Yes.", "rejected": "No."}        TRL; prompt: a text, or messages
    {"chosen": [...], "rejected": [...]}                            TRL: whole conversations, which
                                                                    begin alike
    {"messages": [..., the answer], "rejected_response": "No."}     ms-swift; `rejected_messages`: a
                                                                    whole conversation
    {"conversations": [...], "chosen": {"from": "gpt", "value": "Yes."}, "rejected": {...}}
    {"instruction": "What?", "input": "", "chosen": "Yes.", "rejected": "No."}      LLaMA-Factory

The chosen answer is the right one wherever no pairs are asked for. Clips are those of the prompt,
of the chosen and of the rejected answer, in this order.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysft.data.example import ASSISTANT
from raysft.data.sources.base import kind
from raysft.data.sources.conversations import LISTS, PAIRS, ROLES
from raysft.errors import BadExample
from raysft.json_types import Json, JsonObject

FIELDS = ("chosen", "rejected", "rejected_response", "rejected_messages")
PROMPT = "prompt"
_ROLES = ("role", "from")


@dataclass(frozen=True)
class Preference:
    """record: that of a conversation which ends in the chosen answer. rejected: messages in place
    of the last `chosen` of it."""

    record: JsonObject
    chosen: int
    rejected: list[JsonObject]


def is_pair(record: JsonObject) -> bool:
    """Whether a conversation has an answer beside its own, or in its place."""
    return bool(_given(record))


def looks_like_pair(record: JsonObject) -> bool:
    """Whether a record of nobody knows which format is a conversation with two answers, and has no
    mere note of such a name."""
    given = _given(record)
    if not given or not all(isinstance(record[name], str | dict | list) for name in given):
        return False
    asked = any(record.get(name) for name in (PROMPT, *LISTS, *PAIRS))
    if given == ["chosen", "rejected"]:
        return asked or all(isinstance(record[name], list) for name in given)
    return asked and "chosen" not in given


def preference(record: JsonObject) -> Preference:
    """Of a record that `is_pair`. Raises BadExample naming what is wrong with it."""
    given = _given(record)
    rest = {name: value for name, value in record.items() if name not in given}
    if given in (["rejected_response"], ["rejected_messages"]):
        return _beside(rest, record[given[0]], given[0])
    if given != ["chosen", "rejected"]:
        raise _wrong(
            f"has {' and '.join(given)}: a pair is chosen and rejected, or rejected_response or "
            "rejected_messages beside a conversation that ends in the chosen answer"
        )
    chosen, rejected = (_messages(record[name], name) for name in given)
    if _begins_with_prompt(chosen) and _begins_with_prompt(rejected):
        return _whole(rest, chosen, rejected)
    for name, messages in zip(given, (chosen, rejected), strict=True):
        if _begins_with_prompt(messages):
            raise _wrong(f"field {name!r} begins with a prompt, and the other with an answer")
    return _behind(rest, chosen, rejected)


def _given(record: JsonObject) -> list[str]:
    return [name for name in FIELDS if record.get(name)]


def _wrong(text: str) -> BadExample:
    return BadExample(text, "malformed record")


def _messages(value: Json, name: str) -> list[JsonObject]:
    """An answer, or a conversation, as messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    items = value if isinstance(value, list) else [value]
    found = [item for item in items if isinstance(item, dict)]
    if len(found) < len(items):
        raise _wrong(f"field {name!r} is {kind(value)}, expected a text or messages")
    return found


def _role(message: JsonObject) -> str:
    """Whose a message is; "" where that is not known, which `messages` will say."""
    found = next((message[name] for name in _ROLES if name in message), "")
    return ROLES.get(found.strip().lower(), "") if isinstance(found, str) else ""


def _begins_with_prompt(messages: list[JsonObject]) -> bool:
    return _role(messages[0]) != ASSISTANT


def _said(message: JsonObject) -> tuple[str, str]:
    return _role(message), repr(message.get("content", message.get("value")))


def _whole(rest: JsonObject, chosen: list[JsonObject], rejected: list[JsonObject]) -> Preference:
    """Two conversations that begin alike. What repeats the prompt, or the chosen one, is no more
    than that."""
    common = 0
    for one, two in zip(chosen, rejected):
        if _said(one) != _said(two):
            break
        common += 1
    if not common:
        raise _wrong("its chosen and its rejected conversation do not begin with the same message")
    all_said = [_said(message) for message in chosen]
    for name in (*LISTS, PROMPT):
        if not rest.get(name):
            continue
        own = _prompt(rest[name]) if name == PROMPT else _messages(rest[name], name)
        said, size = [_said(message) for message in own], len(own)
        if not any(all_said[at : at + size] == said for at in range(len(chosen))):
            raise _wrong(
                f"field {name!r} says otherwise than its chosen conversation: leave it out, or "
                "give the answers alone"
            )
    kept = {name: value for name, value in rest.items() if name not in (*LISTS, PROMPT)}
    return Preference({**kept, LISTS[0]: chosen}, len(chosen) - common, rejected[common:])


def _behind(rest: JsonObject, chosen: list[JsonObject], rejected: list[JsonObject]) -> Preference:
    """Two answers to the conversation of the record."""
    asked = [name for name in (PROMPT, *LISTS, *PAIRS) if rest.get(name)]
    if len(asked) != 1:
        found, known = " and ".join(asked) or "none of them", ", ".join((PROMPT, *LISTS, *PAIRS))
        raise _wrong(f"chosen and rejected answer one of {known}; it has {found}")
    name = asked[0]
    if name in PAIRS:
        if rest.get(PAIRS[name]):
            raise _wrong(f"field {PAIRS[name]!r} beside 'chosen' would not be learnt: leave one")
        if len(chosen) != 1:
            raise _wrong(f"field 'chosen' beside {name!r} is a list, expected one text")
        content = chosen[0].get("content", chosen[0].get("value"))
        return Preference({**rest, PAIRS[name]: content}, 1, rejected)
    before = _prompt(rest[name]) if name == PROMPT else _messages(rest[name], name)
    if not before or _role(before[-1]) == ASSISTANT:
        raise _wrong(f"field {name!r} ends in an answer, and chosen and rejected are two others")
    kept = {key: value for key, value in rest.items() if key != name}
    where = name if name in LISTS else LISTS[0]
    return Preference({**kept, where: [*before, *chosen]}, len(chosen), rejected)


def _prompt(value: Json) -> list[JsonObject]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return _messages(value, PROMPT)


def _beside(rest: JsonObject, value: Json, name: str) -> Preference:
    """A rejected answer beside a conversation that ends in the chosen one."""
    rejected = _messages(value, name)
    if not _begins_with_prompt(rejected):
        return Preference(rest, 1, rejected)
    where = next((each for each in LISTS if rest.get(each)), None)
    if where is None:
        raise _wrong(f"field {name!r} is a whole conversation, and there is none beside it")
    return _whole(
        {key: v for key, v in rest.items() if key != where},
        _messages(rest[where], where),
        rejected,
    )
