"""Chat templates: the text that stands around question and answer, read off a jinja template.

Stands under `text.Template`. `resolve` says which template a run has (the model's own, or the plain
form written as one) and freezes what would change in it from day to day; `probe` renders it around
marks instead of text, once a shape of question, so that an example costs no jinja.

What is trained on is what transformers renders: the prompt is that of
`apply_chat_template(..., add_generation_prompt=True)`, and with the answer it is that of the whole
conversation up to the end token. What a template writes between the two (a space, an empty
thinking block, the name of a channel) begins the answer, for a model has to write it itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from raysft.errors import UserError
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A text while a template is rendered: between Unicode noncharacters, which no text has and no
# template changes.
_MARK = "\ufdd0{}\ufdd1"
_ANSWER = _MARK.format("\ufdd2")
_SPACES = " \t\n\r\v\f"
# Texts that a template must hand on as they are, but for white space at their ends, of which it
# takes off all of a kind or nothing.
_SAMPLES = (
    "Ab  c\n\nd's \u00e9<x>",
    "Ab\tc\r\nd \n\n\n\n e\rf\u00a0\u3000g   h\\n",
    " \n\t Ab \t\n ",
    "\u00a0Ab\u3000",
    *(f"{space * 2}Ab{space * 2}" for space in _SPACES),
)
_PLAIN = "{#- the plain form: instruction, newline, input, newline, answer -#}\n"
_NOW = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(['"])(.*?)\1\s*\)""")
_CLOCK = re.compile(r"strftime_now\s*\(")
# What nobody writes by the way, unlike words and white space.
_UNUSUAL = re.compile(r"^[<\[/|{#\u2581\uff5c]+ ?\w.", re.DOTALL)
_LOOKS = {"startswith", "endswith", "split", "rsplit", "partition", "rpartition", "find", "count"}
_LOOKS |= {"rfind", "index", "rindex", "replace", "removeprefix", "removesuffix"}
_MARKER = re.compile(r"<\|.*\|>", re.DOTALL)
_MARKERS = re.compile(r"<\|[^<>|\s]+\|>")

Part = dict[str, str]
"""A part of a message: {"type": "text", "text": ...} or {"type": "audio"}."""

Ends = tuple[str | None, str | None]
"""White space that is taken off the left and the right of a text; None: all."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the texts of a dialogue of one turn.

    pieces: the prompt, cut where its texts go. lead, tail: around the answer, the end token not
    included. question_ends (of each text), answer_ends: white space that is taken off each end of a
    text (left, right); None: all.
    """

    pieces: tuple[str, ...]
    lead: str
    tail: str
    question_ends: tuple[Ends, ...]
    answer_ends: Ends

    def prompt(self, texts: Sequence[str]) -> str:
        """What the model is given."""
        rest = zip(self.question(texts), self.pieces[1:], strict=True)
        return self.pieces[0] + "".join(text + piece for text, piece in rest)

    def question(self, texts: Sequence[str]) -> list[str]:
        """Its texts, as they are shown."""
        return [_cut(text, ends) for text, ends in zip(texts, self.question_ends, strict=True)]

    def answer(self, text: str) -> str:
        """What it is to write, up to the end token."""
        return f"{self.lead}{_cut(text, self.answer_ends)}{self.tail}"


def _cut(text: str, ends: Ends) -> str:
    return text.lstrip(ends[0]).rstrip(ends[1])


def plain_template(begin: str, end: str, audio: str | None) -> str:
    """The plain form as a chat template: `instruction NEWLINE input NEWLINE answer END`.

    begin: text before it; audio: what stands for a clip, where there are clips. An empty question
    has no newline behind it.
    """
    text = "{{- part['text'] -}}{%- if loop.first and not loop.last -%}{{- '\\n' -}}{%- endif -%}"
    if audio is not None:
        clip = f"{{%- if part['type'] == 'audio' -%}}{{{{- {audio!a} -}}}}"
        text = f"{clip}{{%- else -%}}{text}{{%- endif -%}}"
    return (
        f"{_PLAIN}"
        "{%- macro shown(content) -%}\n"
        "{%- if content is string -%}{{- content -}}{%- else -%}\n"
        f"{{%- for part in content -%}}{text}{{%- endfor -%}}\n"
        "{%- endif -%}\n"
        "{%- endmacro -%}\n"
        f"{{{{- {begin!a} -}}}}\n"
        "{%- for message in messages -%}\n"
        "{%- set text = shown(message['content']) -%}\n"
        f"{{%- if message['role'] == 'assistant' -%}}{{{{- text + {end!a} -}}}}\n"
        "{%- elif text -%}{{- text + '\\n' -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}"
    )


def is_plain(source: str) -> bool:
    """Whether a template is the plain form, of this run or of one that was exported before."""
    return source.startswith(_PLAIN)


def freeze(source: str, now: datetime | None = None) -> str:
    """The template with the date of `now` in place of every call of strftime_now: a run sees one
    prompt from its start to its end, and so does who uses its export. Raises UserError."""
    moment = now or datetime.now()
    frozen = _NOW.sub(lambda call: ascii(moment.strftime(call[2])), source)
    if call := _CLOCK.search(frozen):
        raise UserError(
            "data.template: the tokenizer's chat template writes the time in a way that cannot be "
            f"kept for a run ({frozen[call.start() : call.start() + 40]!r}): set it to plain"
        )
    return frozen


class Chat:
    """A template with its tokenizer: renders dialogues of one turn around marks.

    parts: whether it takes a message as a list of parts, as templates of models that hear do.
    end: the token that ends an answer. remark: what a user should know of it, or "".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, source: str, audio: str | None) -> None:
        """audio: the audio token, where messages may hold clips. Raises UserError for a template
        that fails, changes texts, or writes tokens that the tokenizer does not have."""
        self._tokenizer, self._source, self._audio = tokenizer, source, audio
        self.remark = ""
        self.parts = audio is not None and self._takes_parts()
        after = self._conversation([_text(_MARK.format(0))]).partition(_ANSWER)[2]
        self.end, self._tail = _end(tokenizer, after)
        mark = _text(_MARK.format(0))
        self._answer_ends = self._ends(lambda text: self._conversation([mark], text), _ANSWER)

    def frame(self, kinds: Sequence[str]) -> Frame:
        """The frame of a question of such parts ("text", "audio"), in this order."""
        marks = [_MARK.format(i) if kind == "text" else None for i, kind in enumerate(kinds)]
        asked = [_audio() if mark is None else _text(mark) for mark in marks]
        texts = [mark for mark in marks if mark is not None]
        prompt = self._prompt(asked)
        pieces, rest = [], prompt
        for mark in texts:
            piece, found, rest = rest.partition(mark)
            pieces.append(piece)
            if not found or mark in rest:
                raise UserError(
                    "data.template: the tokenizer's chat template does not show every part of a "
                    "question once, in the order given: set data.template to plain"
                )
        pieces.append(rest)
        whole = self._conversation(asked)
        shown = whole.partition(_ANSWER)[0]
        if whole.count(_ANSWER) != 1 or not all(mark in shown for mark in texts):
            raise UserError(
                "data.template: the tokenizer's chat template does not show a question and its "
                "answer once each, in this order: set data.template to plain"
            )
        lead = shown.removeprefix(prompt)
        if not shown.startswith(prompt):
            # A template whose prompt is no beginning of its conversations (one that opens a
            # thinking block only to ask). The prompt is what the model will be given: it stays.
            lead = ""
            self.remark = (
                f"the chat template asks with a prompt that ends in {prompt[-40:]!r}, which its "
                f"own conversations do not show before an answer ({shown[-40:]!r}): the answer is "
                "trained right behind that prompt"
            )

        def asking(at: int, text: str) -> str:
            return self._prompt(_with(asked, {at: text}))

        ends = tuple(
            self._ends(partial(asking, at), mark)
            for at, mark in enumerate(marks)
            if mark is not None
        )
        frame = Frame(tuple(pieces), lead, self._tail, ends, self._answer_ends)
        for sample in _SAMPLES:
            if not self._keeps(frame, asked, whole, sample):
                raise UserError(
                    "data.template: the tokenizer's chat template changes the text it is given (a "
                    f"question or answer {sample!r} comes out otherwise): set data.template to "
                    "plain"
                )
        return frame

    def altering(self) -> set[str]:
        """Texts that the template looks for in a question or answer, to write something else where
        it finds them: `</think>`, `/no_think`. No text of an example may contain them. Raises
        UserError where they are what people write."""
        asked = [_text(_MARK.format(0))]
        frame, whole = self.frame(("text",)), self._conversation(asked)
        literals, sought = _literals(self._source)
        found = {
            literal
            for literal in literals
            for text in (f"{literal}Ab", f"Ab{literal}", f"Ab{literal}cd{literal}ef", literal)
            if not self._keeps(frame, asked, whole, text)
        }
        pairs = [(first, last) for first in sought - found for last in sought - found - {first}]
        for first, last in pairs:  # one that begins a text, with one that ends it
            if not self._keeps(frame, asked, whole, f"{first}Ab{last}"):
                found |= {first, last}
        found = {text for text in found if not any(part in text for part in found - {text})}
        if ordinary := sorted(text for text in found if not _UNUSUAL.search(text.strip())):
            raise UserError(
                "data.template: the tokenizer's chat template changes the text it is given where "
                f"that contains {ordinary[0]!r}: set data.template to plain"
            )
        return found

    def _keeps(self, frame: Frame, asked: list[Part], whole: str, text: str) -> bool:
        """Whether `text` comes through in every place, and all around it stays.
        whole: the conversation of marks."""
        places = [at for at, part in enumerate(asked) if part["type"] == "text"]
        said = _with(asked, dict.fromkeys(places, text))
        texts = [text] * len(places)
        for at, shown in zip(places, frame.question(texts), strict=True):
            whole = whole.replace(asked[at]["text"], shown)
        whole = whole.replace(_ANSWER, _cut(text, frame.answer_ends))
        try:
            return (
                self._prompt(said) == frame.prompt(texts)
                and self._conversation(said, text) == whole
            )
        except UserError:  # it does not take such a text
            return False

    def _ends(self, render: Callable[[str], str], mark: str) -> Ends:
        """White space that the template takes off each end of a text."""
        bare = render(mark)
        left = "".join(space for space in _SPACES if render(space + mark) == bare)
        right = "".join(space for space in _SPACES if render(mark + space) == bare)
        return (None if left == _SPACES else left), (None if right == _SPACES else right)

    def _takes_parts(self) -> bool:
        """Whether a clip given as a part of a message becomes one audio token."""
        mark = _MARK.format(0)
        try:
            shown = self._render([{"role": "user", "content": [_audio(), _text(mark)]}], True)
        except UserError:
            return False
        return shown.count(self._audio or "") == 1 and shown.count(mark) == 1

    def _prompt(self, asked: list[Part]) -> str:
        return self._render([{"role": "user", "content": self._content(asked)}], True)

    def _conversation(self, asked: list[Part], answer: str = _ANSWER) -> str:
        turns = (("user", asked), ("assistant", [_text(answer)]))
        messages = [{"role": role, "content": self._content(parts)} for role, parts in turns]
        return self._render(messages, False)

    def _content(self, parts: list[Part]) -> list[Part] | str:
        return list(parts) if self.parts else "".join(part["text"] for part in parts)

    def _render(self, messages: list[JsonObject], ask: bool) -> str:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=ask,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"data.template: the tokenizer's chat template failed ({error}): set it to plain"
            ) from error


def _with(parts: list[Part], texts: dict[int, str]) -> list[Part]:
    """Parts of a message with other texts in some places."""
    return [_text(texts[at]) if at in texts else part for at, part in enumerate(parts)]


def _literals(source: str) -> tuple[set[str], set[str]]:
    """The strings that a template has between its tags, and those of them that it may look for in a
    text: operands of `in`, first arguments of methods and filters."""
    import jinja2

    # Tokens, not a tree: that would need the tags that transformers adds to jinja's own.
    try:
        tokens = list(jinja2.Environment().lexer.tokenize(source))  # noqa: S701 - nothing is rendered
    except jinja2.TemplateError as error:
        raise UserError(
            f"data.template: the tokenizer's chat template failed ({error}): set it to plain"
        ) from error
    found, sought = set(), set()
    for at, token in enumerate(tokens):
        if token.type != "string" or not token.value:
            continue
        found.add(token.value)
        before = [(t.type, t.value) for t in tokens[max(0, at - 2) : at]]
        called = before[-1:] == [("lparen", "(")] and before[0][0] == "name"
        behind = {t.value for t in tokens[at + 1 : at + 3]}
        if "in" in behind or (called and before[0][1] in _LOOKS):
            sought.add(token.value)
    return found, sought


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _audio() -> Part:
    return {"type": "audio"}


def _end(tokenizer: PreTrainedTokenizerFast, after: str) -> tuple[str, str]:
    """The first control token behind the answer, and what stands before it. Where the template
    ends an answer with nothing, the tokenizer's end token does."""
    ends = control_tokens(tokenizer, ())
    places = sorted((after.find(token), -len(token), token) for token in ends if token in after)
    if places:
        return places[0][2], after[: places[0][0]]
    if after.strip():
        raise UserError(
            f"data.template: the chat template ends an answer with {after.strip()!r}, which is no "
            "control token of the tokenizer, so no answer would end there: use the tokenizer that "
            "belongs to the template, or set data.template to plain"
        )
    return tokenizer.eos_token, ""


def control_tokens(tokenizer: PreTrainedTokenizerFast, sources: Sequence[str]) -> set[str]:
    """Tokens that steer a model and that no text may bring: all special ones, and of the others
    that were added those that a chat template writes (`<think>`) or that look like `<|...|>`.
    sources: the templates."""
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special}
    found |= {
        token.content
        for token in added
        if token.content.strip()
        and (_MARKER.fullmatch(token.content) or any(token.content in text for text in sources))
    }
    found |= set(tokenizer.all_special_tokens)
    return {token for token in found if token.strip()}


def unread(tokenizer: PreTrainedTokenizerFast, shown: str) -> str:
    """A remark on markers that a template writes (shown: around nothing) and that are no tokens: so
    they are in some models, and so they come out beside a tokenizer that is another model's."""
    known = tokenizer.get_vocab()
    found = [name for name in dict.fromkeys(_MARKERS.findall(shown)) if name not in known]
    if not found:
        return ""
    return (
        f"the chat template writes {', '.join(found[:3])}, no token of the tokenizer, which "
        "reads it letter by letter: is it the template of this model?"
    )
