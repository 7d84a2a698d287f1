"""Conversations of several turns as their chat template writes them, and which of it is learnt.

Stands under `text.Template`, beside `chat` (the short form: one question, one answer). The text is
that of transformers' `apply_chat_template`, rendered for every example, for what a template does
with a turn may depend on all the others. What is learnt of it is, in this order:

- what the template itself marks as the assistant's (`{% generation %}`);
- from the end of the prompt that asks for a turn, up to and with its end token: found by rendering
  the conversation with marks instead of its texts;
- where the template changes what it is given (a reasoning model's drops or moves what stands in
  `<think>`): from the end of the prompt for that turn, where the whole begins with that prompt.

Costs 1 ms a conversation of five turns, twice an example: when it is measured and when encoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from raysft.data.example import ASSISTANT, Audio, Example, Turn, Units
from raysft.errors import BadExample, first_line
from raysft.json_types import JsonObject

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Texts while a template is rendered: Unicode noncharacters, which no text has.
_MARK = "\ufdd0{}\ufdd1"
_MARKS = re.compile("\ufdd0[0-9]+\ufdd1")
_KNOWN = 1024  # shapes of conversations whose leads are kept: calls of tools differ without end

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Shown:
    """A conversation as text. learnt: its spans, in order. bare: what the template writes where
    the example's own texts are left out."""

    text: str
    learnt: list[Span]
    bare: str


@dataclass
class Conversations:
    """A chat template, for conversations.

    source: the template. specials: names of special tokens, which it may write. parts: whether it
    takes clips as parts of a message; else a clip is written `markup` into the text. hole: what a
    row of units is written as. end: the token that ends an answer. only_parts: whether it takes
    texts as parts of a message too, and no message that is a text.
    """

    source: str
    specials: dict[str, str]
    parts: bool
    markup: str
    hole: str
    end: str
    only_parts: bool = field(init=False)
    _leads: dict[tuple[object, ...], str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        mark = _MARK.format(0)
        asked = [{"role": "user", "content": mark}]
        try:
            self.only_parts = self.parts and mark not in self._rendered(asked, True)
        except BadExample:
            self.only_parts = self.parts

    def shown(self, example: Example, supervise: str) -> Shown:
        """All turns up to the last one that is learnt, with what follows it.

        supervise: `data.supervise`. Raises BadExample where nothing is learnt, or the template
        does not take the conversation or does not show what is learnt of it.
        """
        turns = example.turns
        self._refuse_unshown(example)
        learnt = _learnt(turns, supervise)
        messages = self._messages(turns)
        marked, texts = self._marked(turns)
        around = self._rendered(marked, False, example.tools)
        bare = _MARKS.sub("", around)
        if _GENERATION.search(self.source):
            return self._as_marked(messages, example, learnt, bare)
        whole = self._rendered(messages, False, example.tools)
        pieces = _pieces(around, len(texts))
        found = None if pieces is None else _found(whole, pieces, texts)
        spans = []
        for number in learnt:
            if found is None:
                span = self._behind_prompt(whole, example, number)
            else:
                span = self._of_turn(whole, example, number, found)
            if span is None or span[0] >= span[1]:
                raise BadExample(
                    f"the chat template does not show turn {number + 1} where it asks for it, so "
                    "it is not known what of it is to be learnt: mark the template's own turns "
                    "with {% generation %}, or set this turn's loss to false",
                    "bad text",
                )
            spans.append(span)
        start, stop = spans[-1]
        if learnt[-1] == len(turns) - 1 and not whole.endswith(self.end, start, stop):
            # Nothing ends an answer in this template: the end token does, as in the short form.
            whole, bare = whole[:stop] + self.end, bare + self.end
            spans[-1] = start, len(whole)
        return Shown(whole, spans, bare)

    def asked(self, example: Example, supervise: str) -> str:
        """The prompt that asks for the last turn that is learnt, as inference has it."""
        before = example.turns[: last_learnt(example, supervise)]
        return self._rendered(self._messages(before), True, example.tools)

    def _refuse_unshown(self, example: Example) -> None:
        """Raises BadExample for what the template has no place for: it would be lost."""
        called = any(turn.calls for turn in example.turns)
        for name, there in (("tools", example.tools), ("tool_calls", called)):
            if there and name not in self.source:
                raise BadExample(
                    f"it has {name}, which the chat template does not show: write them into the "
                    "text of a message",
                    "bad text",
                )

    # -- what is learnt --------------------------------------------------------------------------

    def _as_marked(
        self, messages: list[JsonObject], example: Example, learnt: list[int], bare: str
    ) -> Shown:
        """By the template's own marks, one for each turn of the assistant."""
        whole, spans = self._render(messages, example.tools, return_assistant_tokens_mask=True)
        own = [number for number, turn in enumerate(example.turns) if turn.role == ASSISTANT]
        if len(spans) != len(own):
            raise BadExample(
                f"the chat template marks {len(spans)} of its {len(own)} assistant turns with "
                "{% generation %}",
                "bad text",
            )
        by_turn = dict(zip(own, spans, strict=True))
        return Shown(whole, [by_turn[number] for number in learnt], bare)

    def _of_turn(self, whole: str, example: Example, number: int, found: list[Span]) -> Span | None:
        """From the end of the prompt up to and with the end token. found: of all texts."""
        counts = [_texts_in(turn) for turn in example.turns]
        first = sum(counts[:number])
        if not counts[number]:  # calls of tools alone, or units
            return self._behind_prompt(whole, example, number)
        start, stop = found[first][0], found[first + counts[number] - 1][1]
        lead = self._lead(example, number)
        if not whole.endswith(lead, 0, start):
            return None
        more = first + counts[number] < len(found)
        following = found[first + counts[number]][0] if more else len(whole)
        at = whole.find(self.end, stop, following)
        return start - len(lead), at + len(self.end) if at >= 0 else stop

    def _lead(self, example: Example, number: int) -> str:
        """What the template writes between the prompt for a turn and its first text: the model has
        to write it. By the shape of the conversation, for texts do not matter."""
        shape = (number, example.tools, *(_shape(turn) for turn in example.turns))
        if shape not in self._leads:
            marked, _ = self._marked(example.turns)
            whole = self._rendered(marked, False, example.tools)
            before = sum(_texts_in(turn) for turn in example.turns[:number])
            shown = whole.partition(_MARK.format(before))[0]
            prompt = self._prompt(marked[:number], example.tools)
            # A prompt that its own conversations do not begin with: the answer alone is learnt.
            fits = prompt is not None and shown.startswith(prompt)
            lead = shown.removeprefix(prompt or "") if fits else ""
            if len(self._leads) >= _KNOWN:
                return lead
            self._leads[shape] = lead
        return self._leads[shape]

    def _behind_prompt(self, whole: str, example: Example, number: int) -> Span | None:
        """By the prompt alone: what follows it, up to and with the end token."""
        messages = self._messages(example.turns)
        prompt = self._prompt(messages[:number], example.tools)
        if prompt is None or not whole.startswith(prompt):
            return None
        at = whole.find(self.end, len(prompt))
        if at < 0 and number < len(example.turns) - 1:
            return None
        return len(prompt), at + len(self.end) if at >= 0 else len(whole.rstrip())

    # -- rendering -------------------------------------------------------------------------------

    def _messages(self, turns: Sequence[Turn]) -> list[JsonObject]:
        return [self._message(turn, turn.texts) for turn in turns]

    def _marked(self, turns: Sequence[Turn]) -> tuple[list[JsonObject], list[str]]:
        """The messages with a mark for each text that is not empty, and those texts."""
        texts: list[str] = []
        messages = []
        for turn in turns:
            own: list[str] = []
            for part in turn.content:
                if isinstance(part, str):
                    own.append(_MARK.format(len(texts)) if part else "")
                    texts += [part] if part else []
            messages.append(self._message(turn, own))
        return messages, texts

    def _message(self, turn: Turn, texts: list[str]) -> JsonObject:
        """texts: what stands for the turn's texts."""
        rest = iter(texts)
        clips = self.parts and any(isinstance(part, Audio) for part in turn.content)
        message: JsonObject = {"role": turn.role}
        if clips or self.only_parts:
            message["content"] = [
                {"type": "text", "text": next(rest) if isinstance(part, str) else self.hole}
                if not isinstance(part, Audio)
                else {"type": "audio"}
                for part in turn.content
            ]
        else:
            message["content"] = "".join(
                next(rest) if isinstance(part, str) else self._written(part)
                for part in turn.content
            )
        if turn.calls:
            message["tool_calls"] = json.loads(turn.calls)
        return message

    def _written(self, part: Audio | Units) -> str:
        return self.markup if isinstance(part, Audio) else self.hole

    def _rendered(self, messages: list[JsonObject], ask: bool, tools: str = "") -> str:
        return self._render(messages, tools, add_generation_prompt=ask)[0]

    def _prompt(self, messages: list[JsonObject], tools: str) -> str | None:
        """The prompt behind `messages`; None where the template makes none (of no message)."""
        try:
            return self._rendered(messages, True, tools)
        except BadExample:
            return None

    def _render(
        self, messages: list[JsonObject], tools: str, **how: bool
    ) -> tuple[str, list[Span]]:
        """The text, and the spans that the template marks, where that is asked for."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=json.loads(tools) if tools else None,
                chat_template=self.source,
                **how,
                **self.specials,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise BadExample(
                f"the chat template does not take this conversation: {first_line(error)}",
                "bad text",
            ) from error
        return texts[0], spans[0] if spans else []


def last_learnt(example: Example, supervise: str) -> int:
    """Number of the last turn that is learnt. Raises BadExample where there is none."""
    return _learnt(example.turns, supervise)[-1]


def _learnt(turns: Sequence[Turn], supervise: str) -> list[int]:
    """Numbers of the turns that are learnt. Raises BadExample where there is none."""
    own = [number for number, turn in enumerate(turns) if turn.role == ASSISTANT]
    found = [
        number
        for number in own
        if (
            supervise == "all" or number == own[-1]
            if turns[number].learnt is None
            else turns[number].learnt
        )
    ]
    if not found:
        raise BadExample("no turn of the assistant is to be learnt", "malformed record")
    return found


def _texts_in(turn: Turn) -> int:
    return sum(isinstance(part, str) and part != "" for part in turn.content)


def _shape(turn: Turn) -> tuple[object, ...]:
    """What of a turn, besides its texts, a template writes by."""
    kinds = (type(part).__name__ if part != "" else "" for part in turn.content)
    return (turn.role, turn.calls, *kinds)


def _pieces(marked: str, texts: int) -> list[str] | None:
    """What stands around the texts; None where they are not shown once each, in order."""
    pieces, rest = [], marked
    for number in range(texts):
        mark = _MARK.format(number)
        piece, shown, rest = rest.partition(mark)
        if not shown or mark in rest:
            return None
        pieces.append(piece)
    return [*pieces, rest]


def _found(whole: str, pieces: list[str], texts: list[str]) -> list[Span] | None:
    """Where the texts lie in `whole`, without the white space that the template takes off their
    ends; None where it changes more than that."""
    spans, at = [], 0
    for text, before, behind in zip(texts, pieces, pieces[1:]):
        if not whole.startswith(before, at):
            return None
        start = at + len(before)
        core = text.strip()
        left, right = (text.split(core, 1)) if core else (text, "")
        starts = (left[cut:] + core for cut in range(len(left) + 1))
        shown = next((part for part in starts if whole.startswith(part, start)), None)
        if shown is None:
            return None
        ends = range(start + len(shown) + len(right), start + len(shown) - 1, -1)
        stop = next((end for end in ends if whole.startswith(behind, end)), None)
        if stop is None or whole[start + len(shown) : stop] != right[: stop - start - len(shown)]:
            return None
        spans.append((start, stop))
        at = stop
    return spans if whole[at:] == pieces[-1] else None
