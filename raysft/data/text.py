"""Text: the template that makes an example a dialogue, and the tokenizer (see `tokenizer`).

Stands in front of the encoders: `Template.render` runs for every example, in the index and in the
data tasks. Rendering gives token ids for text and leaves audio and units as they are, so that
neither ever passes through the text tokenizer: one token stands for each while the dialogue is
tokenized, whole, as transformers would.

Costs about 60 us an example. Pickled, a template carries the tokenizer twice: as the bare
`tokenizers` object that data tasks use, and as bytes from which the transformers one (1 s of
imports) is only made where somebody asks for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np

from raysft.config.schema import Data
from raysft.data import scripts, untold
from raysft.data.chat import (
    Chat,
    Frame,
    control_tokens,
    freeze,
    is_plain,
    plain_template,
    unread,
)
from raysft.data.conversation import Conversations, Shown, last_learnt
from raysft.data.example import ASSISTANT, Audio, Example, Part, Units
from raysft.data.segments import Rendered, Segment, bare, cut
from raysft.data.tokenizer import (
    HoldsTokenizer,
    add_units,
    byte_tokenizer,
    last_token,
    load_tokenizer,
    template_of,
    unit_ids,
    unit_pattern,
)
from raysft.errors import BadExample, UserError
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "Rendered",
    "Segment",
    "Template",
    "add_units",
    "byte_tokenizer",
    "load_tokenizer",
    "unit_ids",
    "unit_pattern",
]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Questions whose frames are made ahead: as kinds of their parts.
_SHAPES = ((), ("text",), ("audio",), ("audio", "text"), ("text", "audio"))
_KNOWN = 256  # prompts whose ids are kept: with clips or units for input there are few

# Tokenizers of this process by fingerprint: a data task gets its encoder pickled, and building a
# tokenizer of 150,000 tokens anew for each task would take longer than encoding a window of text.
_backends: dict[str, Tokenizer] = {}


class NoInstruction(UserError):
    """An example brings none, and data.prompts has none for its task."""


class Template(HoldsTokenizer):
    """Makes examples dialogues, as a chat template writes them: of one turn here, of several in
    `conversation`.

    The template is the model's own (`data.template: chat`), or the plain form written as one
    (`chat.plain_template`): `instruction NEWLINE input NEWLINE answer END`, behind a begin token
    where the tokenizer puts one. Instruction and input are one user turn, the instruction first and
    a newline between; a template that takes clips as parts of a message has the input first, as
    models that hear are asked, and no newline. Ids are those of the whole conversation, up to and
    with the token that ends the answer; the prompt's are those of the prompt alone. Where a
    tokenizer joins the two (a newline before with one behind), the prompt stays as it is.

    source: the template, dates and all: what a run keeps and exports. chat: whether it is the
    model's own. fingerprint: sha256 of all that decides the ids of an example's text. end_id: the
    end token. remark: what a user should know of it, or "".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        data: Data,
        reserved: Iterable[str] = (),
        hole: str | None = None,
        markup: str | None = None,
        own: str | None = None,
        kept: str | None = None,
        units: re.Pattern[str] | None = None,
    ) -> None:
        """reserved: tokens that an example's own text may not contain, next to the control tokens
        of the tokenizer and its template. hole: the token that stands for a clip or a row of units
        (None: there is no such part that could be used). markup: how a clip is written, around its
        hole; None: only the hole. own: the model's template; default: the tokenizer's. kept: that
        of a run which began before. units: names of unit tokens, which no text may contain. Raises
        UserError for a template that cannot be trained on.
        """
        self._tokenizer: PreTrainedTokenizerFast | bytes = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._prompts, self._supervise = dict(data.prompts), data.supervise
        self._hole, self._markup, self._units = hole or "", markup or hole or "", units
        self._hole_id: int | None = tokenizer.convert_tokens_to_ids(hole) if hole else None
        if data.template == "step":
            own = scripts.step_template(tokenizer)
        elif own is None and data.template != "plain":
            own = template_of(tokenizer)
        if data.template == "chat" and own is None:
            raise UserError(
                "data.template: chat, but the tokenizer has no chat template: "
                "set data.template to plain, or add a chat template to the tokenizer"
            )
        plain = plain_template(_begin(tokenizer), tokenizer.eos_token, markup)
        self.source: str = kept or (plain if data.template == "plain" else freeze(own or plain))
        self.chat = not is_plain(self.source)
        chat = Chat(tokenizer, self.source, hole if markup else None)
        self._parts = chat.parts
        self._frames: dict[tuple[str, ...], Frame] = {
            kinds: chat.frame(kinds)
            for kinds in _SHAPES
            if (self._parts or "audio" not in kinds) and (kinds or not self.chat)
        }
        self.remark = chat.remark
        self._end = chat.end
        self._ends: tuple[int | None, int] = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._conversations = Conversations(
            self.source,
            dict(tokenizer.special_tokens_map),
            self._parts,
            self._markup,
            self._hole,
            chat.end,
        )
        self.end_id: int = tokenizer.convert_tokens_to_ids(chat.end)
        first = self._frames[("text",)]
        self._before = first.pieces[0]
        # A processor lets its tokenizer put a begin token where the template wrote none.
        begin = _begin(tokenizer) if markup else ""
        self._begin = "" if self._before.startswith(begin) else begin
        named = {chat.end, *reserved}
        self._control, self._steering = self._guards([own, self.source], named, units)
        self._special, _ = self._guards([], named, units)
        altering = sorted(map(re.escape, chat.altering())) if self.chat else ()
        self._altering = re.compile("|".join(altering)) if altering else None
        whole = tokenizer.added_tokens_decoder.values()
        self._stop = next((t.content for t in whole if t.special and not t.rstrip), "")
        self._known: dict[str, tuple[list[int], int, int]] = {}
        self._expected: dict[Frame, Counter[int]] = {}
        self._fine: set[tuple[tuple[str, ...], int, tuple[int, ...]]] = set()
        self._refuse_control_in_prompts()
        if self.chat:
            self._refuse_unknown(first)
            shown = f"{first.prompt([''])}{first.answer('')}{self._end}"
            self.remark = self.remark or unread(tokenizer, shown)
        self._lead, self._tail = (self._shown(text) for text in (first.lead, first.tail))
        self.fingerprint = self._fingerprint()

    def _guards(
        self, sources: Iterable[str | None], more: set[str], units: re.Pattern[str] | None
    ) -> tuple[re.Pattern[str], frozenset[int]]:
        """What no text may contain, and the ids that no text may become."""
        tokenizer = self.tokenizer
        control = control_tokens(tokenizer, [text for text in sources if text]) | more
        named = [re.escape(token) for token in sorted(control, key=len, reverse=True)]
        if units is not None:  # by thousands: one pattern for all
            control = {token for token in control if not units.fullmatch(token)}
            named = [units.pattern, *map(re.escape, sorted(control, key=len, reverse=True))]
        pattern = re.compile("|".join(named))
        # Unknown words and bytes are ordinary text, whatever their tokens are called; but not where
        # the unknown token is also the one that ends answers.
        ordinary = {token for token in control if _BYTE.fullmatch(token)}
        ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, self._end}
        ordinary |= {tokenizer.unk_token} - ends
        ids = tokenizer.convert_tokens_to_ids(sorted(control - ordinary))
        return pattern, frozenset(ids) - {self._hole_id}

    def _refuse_unknown(self, frame: Frame) -> None:
        """Raises UserError for a template that writes what the tokenizer has no token for."""
        unknown = self._backend.token_to_id(self.tokenizer.unk_token or "")
        text = f"{frame.prompt([''])}{frame.answer('')}{self._end}"
        encoded = self._backend.encode(text, add_special_tokens=False)
        if unknown is None or unknown in self._steering or unknown not in encoded.ids:
            return
        start, end = encoded.offsets[encoded.ids.index(unknown)]
        raise UserError(
            f"data.template: the chat template writes {text[start:end]!r}, for which the tokenizer "
            f"has no token ({self.tokenizer.unk_token} would be trained on): use the tokenizer "
            "that belongs to the template, or set data.template to plain"
        )

    def _refuse_control_in_prompts(self) -> None:
        for task, prompt in self._prompts.items():
            if match := self._control.search(prompt):
                raise UserError(
                    f"data.prompts.{task}: contains {match[0]}, a token that steers the model: the "
                    "chat template writes those; give the instruction alone"
                )
            if self._altering and (match := self._altering.search(prompt)):
                raise UserError(
                    f"data.prompts.{task}: contains {match[0]!r}, for which the chat template "
                    "writes something else: give the instruction without it"
                )

    def _shown(self, text: str) -> str:
        """A text as it comes back from the model."""
        ids = self._encode(text)
        return self.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def __getstate__(self) -> dict[str, object]:
        empty: dict[str, object] = {"_known": {}, "_expected": {}, "_fine": set()}
        return {**super().__getstate__(), "_backend": self._backend.to_str(), **empty}

    def __setstate__(self, state: JsonObject) -> None:
        from tokenizers import Tokenizer

        self.__dict__.update(state)
        if self.fingerprint not in _backends:
            _backends[self.fingerprint] = Tokenizer.from_str(state["_backend"])
        self._backend = _backends[self.fingerprint]

    def _fingerprint(self) -> str:
        facts = [self.source, self._begin, self._parts, self.end_id, self._markup, self._prompts]
        facts += [self._supervise] * (self._supervise != "all")  # which came later
        content = self._backend.to_str() + json.dumps(facts, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def render(self, example: Example) -> Rendered:
        """Its segments. Raises BadExample, or UserError without a prompt."""
        if example.script == scripts.DIALOG:
            return scripts.dialog(example, self.tools(), self._prompts)
        if example.script:
            example = scripts.conversation(example, self._prompts)
        if example.turns:
            return self._conversation(example)
        if example.tokens is not None:
            return untold.given(example.tokens, self._backend.get_vocab_size())
        if example.document:
            return untold.document(
                example.document, self._ends, self._backend, self._encode, self._control
            )
        instruction = example.instruction
        if instruction is None:
            if example.task not in self._prompts:
                raise NoInstruction(
                    f"data.prompts: has no entry for task {example.task!r}, and example "
                    f"{example.id} brings no instruction: add {example.task}: TEXT to data.prompts"
                )
            instruction = self._prompts[example.task]
        for part in (instruction, *example.input, *example.output):
            if isinstance(part, str) and (match := self._control.search(part)):
                raise BadExample(
                    f"its text contains {match[0]}, a token that steers the model", "bad text"
                )
            if isinstance(part, str) and self._altering and (match := self._altering.search(part)):
                raise BadExample(
                    f"its text contains {match[0]!r}, for which the chat template writes something "
                    "else",
                    "bad text",
                )
        asked, told = (_others(parts) for parts in (example.input, example.output))
        if (asked or told) and self._hole_id is None:
            return bare(asked, told)  # no encoder without a hole takes such a part
        kinds, texts = self._question(instruction, example.input)
        frame = self._frame(kinds)
        answer = self._flat(example.output, self._hole)
        if example.task == "asr" and example.lang:
            answer = f"{example.lang}\t{answer}"
        prompt = self._begin + frame.prompt(texts)
        ids, rest = self._ids(prompt, f"{frame.answer(answer)}{self._end}")
        whole = ids + rest
        self._refuse_steering(whole, kinds, len(asked))
        learnt = np.zeros(len(whole), bool)
        learnt[len(ids) :] = True
        return cut(whole, learnt, asked + told, self._hole_id)

    def prompt(self, example: Example) -> list[Segment]:
        """What a model is given to answer it: of a conversation, all before the last turn that is
        learnt. Raises as `render` does."""
        if example.script == scripts.DIALOG:
            return scripts.asked(example, self.tools(), self._prompts).segments
        if example.script:
            example = scripts.conversation(example, self._prompts)
        if not example.turns:
            return self.render(example).prompt
        self._check_turns(example)
        text = self._begin + self._conversations.asked(example, self._supervise)
        asked = example.turns[: last_learnt(example, self._supervise)]
        others = _others(part for turn in asked for part in turn.content)
        ids = self._encode(text)
        return cut(ids, np.zeros(len(ids), bool), others, self._hole_id).segments

    # -- conversations ---------------------------------------------------------------------------

    def _conversation(self, example: Example) -> Rendered:
        """Ids as transformers has them, cut where what is learnt begins and ends; nothing behind
        the last of it."""
        self._check_turns(example)
        others = _others(example.parts)
        if others and self._hole_id is None:  # no encoder without a hole takes such a part
            return bare(others, [])
        shown = self._conversations.shown(example, self._supervise)
        encoding = self._encoding(self._begin + shown.text)
        learnt = np.zeros(len(encoding.ids), bool)
        for start, stop in shown.learnt:
            first = encoding.char_to_token(len(self._begin) + start)
            last = encoding.char_to_token(len(self._begin) + stop - 1)
            if first is not None:  # else nothing is written there
                learnt[first : len(learnt) if last is None else last + 1] = True
        self._refuse_steering_in(shown, encoding.ids, example)
        return cut(encoding.ids, learnt, others, self._hole_id).until_learnt()

    def _check_turns(self, example: Example) -> None:
        """Raises BadExample for a text with a token that is special: the template writes those. A
        token that a template merely knows (`<think>`, `<tool_call>`) is the assistant's to write.
        """
        for number, turn in enumerate(example.turns, 1):
            guard = self._special if turn.role == ASSISTANT else self._control
            for text in turn.texts:
                if match := guard.search(text):
                    raise BadExample(
                        f"the text of turn {number} contains {match[0]}, a token that steers the "
                        "model",
                        "bad text",
                    )

    def _refuse_steering_in(self, shown: Shown, ids: list[int], example: Example) -> None:
        """Raises BadExample where a text became a control token by other ways than its name."""
        own = Counter(self._steers(self._encode(self._begin + shown.bare)))
        for token in Counter(self._steers(ids)) - own:
            name = self._piece(token)
            if not any(name in turn.text for turn in example.turns):
                raise BadExample(
                    f"its text becomes {name}, a token that steers the model", "bad text"
                )

    def tools(self) -> scripts.Tools:
        """For scripts. Raises UserError where there are no units to tell them with."""
        if self._hole_id is None or self._units is None:
            raise UserError(
                "data: a dialog of speech needs a model that reads and writes units: causal_lm "
                "with model.speech_units or data.speech_tokens"
            )
        token, hole = self._backend.token_to_id, (self._hole, self._hole_id)
        guards = self._control, self._steers
        return scripts.Tools(self._encode, self._rest, token, *guards, hole, self._ends)

    def answer_of(self, generated: str) -> str:
        """The answer in a generated text: without what the template writes around it."""
        return generated.removeprefix(self._lead).removesuffix(self._tail)

    # -- the question ----------------------------------------------------------------------------

    def _question(
        self, instruction: str, given: Sequence[Part]
    ) -> tuple[tuple[str, ...], list[str]]:
        """Kinds of the parts of a message, and the texts among them."""
        parts: list[Part] = [part for part in given if part != ""]
        if self._parts and self.chat and any(not isinstance(part, str) for part in parts):
            parts += [instruction] if instruction else []
        elif instruction:
            behind = parts and (isinstance(parts[0], str) or not self._parts)
            parts = [f"{instruction}\n" if behind else instruction, *parts]
        if not self._parts:
            parts = [self._flat(parts, self._markup)]
        joined: list[Part] = []
        for part in parts:
            if joined and isinstance(part, str) and isinstance(joined[-1], str):
                joined[-1] += part
            elif part != "":
                joined.append(part)
        kinds = tuple("text" if isinstance(part, str) else "audio" for part in joined)
        return kinds, [part for part in joined if isinstance(part, str)]

    def _frame(self, kinds: tuple[str, ...]) -> Frame:
        if kinds not in self._frames:  # a rare shape: costs 1 s of imports in a data task, once
            chat = Chat(self.tokenizer, self.source, self._hole if self._parts else None)
            self._frames[kinds] = chat.frame(kinds)
        return self._frames[kinds]

    @staticmethod
    def _flat(parts: Iterable[Part], hole: str) -> str:
        return "".join(part if isinstance(part, str) else hole for part in parts)

    # -- ids -------------------------------------------------------------------------------------

    def _ids(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of the answer as the whole conversation has it."""
        known = self._known.get(prompt)
        if known is None:
            ids = self._encode(prompt)
            known = (ids, *last_token(self._backend, prompt))
            if len(self._known) < _KNOWN:
                self._known[prompt] = known
        ids, before, at = known
        whole = ids[:before] + self._encode(prompt[at:] + answer)
        if whole[: len(ids)] == ids:
            return ids, whole[len(ids) :]
        return ids, self._rest(ids, whole, answer)

    def _rest(self, ids: list[int], whole: list[int], answer: str) -> list[int]:
        """Ids of an answer whose beginning the tokenizer joined with the prompt's end (a newline
        with a newline). The model will be given the prompt as it is: the piece that spans both is
        cut there, and the others stay."""
        wanted = "".join(map(self._piece, ids))
        shown, end = "", 0
        while len(shown) < len(wanted) and end < len(whole):
            shown += self._piece(whole[end])
            end += 1
        if shown.startswith(wanted):
            cut = [token.id for token in self._backend.model.tokenize(shown[len(wanted) :])]
            if "".join(map(self._piece, cut)) == shown[len(wanted) :]:
                return cut + whole[end:]
        # The prompt's text comes out otherwise: the answer for itself, behind a token, so that it
        # is not taken for the beginning of a text.
        return self._encode(self._stop + answer)[bool(self._stop) :]

    def _piece(self, token: int) -> str:
        return cast(str, self._backend.id_to_token(token))  # an id of its own

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        with _readable():  # as a batch: `encode` works out offsets, for nearly twice the time
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _encoding(self, text: str) -> Encoding:
        with _readable():
            return self._backend.encode(text, add_special_tokens=False)

    def _refuse_steering(self, ids: list[int], kinds: tuple[str, ...], clips: int) -> None:
        """Raises BadExample where text became a control token by other ways than its name: by
        being unknown, or by what the tokenizer makes of it first."""
        steers = self._steers(ids)
        seen = kinds, clips, tuple(steers)
        if seen in self._fine:
            return
        frame = self._frame(kinds)
        if frame not in self._expected:
            prompt, answer = frame.prompt([""] * (len(frame.pieces) - 1)), frame.answer("")
            bare = self._encode(f"{self._begin}{prompt}{answer}{self._end}")
            self._expected[frame] = Counter(self._steers(bare))
        surplus = Counter(steers) - self._expected[frame]
        if surplus and not self._parts:  # clips are written into the text
            for token, count in Counter(self._steers(self._encode(self._markup))).items():
                surplus[token] -= count * clips
        if more := [token for token, count in surplus.items() if count > 0]:
            name = self._backend.id_to_token(more[0])
            raise BadExample(f"its text becomes {name}, a token that steers the model")
        if len(self._fine) < _KNOWN:
            self._fine.add(seen)

    def _steers(self, ids: list[int]) -> list[int]:
        steering = self._steering
        return [token for token in ids if token in steering]


@contextmanager
def _readable() -> Iterator[None]:
    """What a tokenizer says of a text is told of the example."""
    try:
        yield
    except Exception as error:  # `tokenizers` raises nothing more special
        raise BadExample(f"its text cannot be tokenized: {error}", "bad text") from error


def _begin(tokenizer: PreTrainedTokenizerFast) -> str:
    """The begin token, where the tokenizer puts one before a text by itself."""
    first = tokenizer("a").input_ids[:1]
    return tokenizer.bos_token if first == [tokenizer.bos_token_id] else ""


def _others(parts: Iterable[Part]) -> list[Audio | Units]:
    return [part for part in parts if not isinstance(part, str)]
