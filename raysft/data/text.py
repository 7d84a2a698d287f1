"""Text: the tokenizer with its speech units, and the template that makes an example a dialogue.

Stands in front of the encoders: `load_tokenizer` runs once, where a run starts; `Template.render`
runs for every example, in the index and in the data tasks. Rendering gives token ids for text and
leaves audio and units as they are, so that neither ever passes through the text tokenizer.

Without a padding token the end token stands in for it. That is safe here: padded positions are
masked by length and labels are set by position, so no end token is taken for padding.

Costs about 50 us an example. Pickled, a template carries the tokenizer twice: as the bare
`tokenizers` object that data tasks use, and as bytes from which the transformers one (1 s of
imports) is only made where somebody asks for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raysft.config.schema import Data, Model
from raysft.data import remote_code
from raysft.data.example import Audio, Example, Part, Units
from raysft.errors import BadExample, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

UNIT = re.compile(r"<\|unit(\d+)\|>")
# Where an audio or unit part, the question or the answer goes while a template is text:
# Unicode noncharacters, which no text has and no template changes.
_QUESTION, _ANSWER = "\ufdd0", "\ufdd1"

Segment = np.ndarray | Audio | Units

# Tokenizers of this process by fingerprint: a data task gets its encoder pickled, and building a
# tokenizer of 150,000 tokens anew for each task would take longer than encoding a window of text.
_backends: dict[str, Tokenizer] = {}


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as the model reads it: text as int32 ids, audio and units still as they are.

    `prompt` is what is given, `answer` what is learnt, its end token included.
    """

    prompt: list[Segment]
    answer: list[Segment]


def load_tokenizer(model: Model, units: int) -> PreTrainedTokenizerFast:
    """The tokenizer of `model.tokenizer` or `model.path`, with `units` unit tokens added.

    Raises UserError where there is none, it has no fast form, or no end token.
    """
    name = model.tokenizer or model.path
    if name is None:
        raise UserError(
            "model.tokenizer: nothing given, and model.path, its default, is not set either: "
            "give a folder, a hub id, or `bytes` for the built-in byte tokenizer"
        )
    if model.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
    else:
        from transformers import AutoTokenizer

        key = "model.tokenizer" if model.tokenizer else "model.path"
        try:
            revision = model.revision if name == model.path else None
            tokenizer = AutoTokenizer.from_pretrained(
                name, **model.model_copy(update={"revision": revision}).hub
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{key}: no tokenizer could be loaded from {name!r}: {reason}"
            ) from None
        if not tokenizer.is_fast:
            raise UserError(
                f"{key}: {name!r} has only a slow tokenizer ({type(tokenizer).__name__}): "
                "convert it to a tokenizer.json, or name another one in model.tokenizer"
            )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.tokenizer: {name!r} has no end token, without which no answer can end: "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    add_units(tokenizer, units)
    return tokenizer


def add_units(tokenizer: PreTrainedTokenizerFast, units: int) -> list[int]:
    """Add `<|unit0|>` .. `<|unit{units-1}|>`; those that are there already keep their ids.
    Returns the ids of the others."""
    from tokenizers import AddedToken

    # Not `special`: units in an answer must survive decoding with skip_special_tokens.
    tokens = [AddedToken(f"<|unit{i}|>", normalized=False, special=False) for i in range(units)]
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(tokens)
    names = [token.content for token in tokens if token.content not in known]
    return tokenizer.convert_tokens_to_ids(names)


def unit_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """int64 [N]: the token id of each unit, N being the number of units the tokenizer has."""
    found = {
        int(match[1]): token
        for name, token in tokenizer.get_vocab().items()
        if (match := UNIT.fullmatch(name))
    }
    missing = next((unit for unit in range(len(found)) if unit not in found), None)
    if missing is not None:
        raise UserError(
            f"model.tokenizer: has <|unit{max(found)}|> but no <|unit{missing}|>: "
            "unit tokens must be numbered without gaps"
        )
    return np.array([found[unit] for unit in range(len(found))], np.int64)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes (id = byte) and `<|bos|>`, `<|eos|>`, `<|pad|>`: 259 tokens.

    Nothing is out of its vocabulary. It is saved by save_pretrained like any other.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The byte-level alphabet: printable bytes stand for themselves, the others for the code
    # points from 256 on, in order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(plain))
    alphabet = {byte: chr(byte) for byte in plain}
    alphabet |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({alphabet[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = {f"{name}_token": f"<|{name}|>" for name in ("bos", "eos", "pad")}
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials.values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def transcript(generated: str) -> str:
    """The transcript in a generated asr answer: what follows `LANG<tab>`, where that is there."""
    return generated.rpartition("\t")[2]


class Template:
    """Makes examples dialogues of one turn, in the plain form or in the tokenizer's chat form.

    plain: `instruction NEWLINE input NEWLINE answer END`, behind a begin token where the tokenizer
    puts one. chat: instruction and input are the user's turn; the answer is the assistant's, up to
    and with the token that ends it. An empty instruction or input takes its newline with it.
    Whatever a chat template puts before the answer (as an empty thinking block) belongs to the
    prompt; what it puts behind the end token is left out.

    fingerprint: sha256 of all that decides the ids of an example's text. end_id: the end token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, data: Data, reserved: Iterable[str] = ()
    ) -> None:
        """`reserved`: tokens that an example's own text may not contain, next to the control
        tokens of the tokenizer and its template."""
        self._tokenizer: PreTrainedTokenizerFast | bytes = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._prompts = dict(data.prompts)
        self.chat = data.template == "chat" or (
            data.template == "auto" and tokenizer.chat_template is not None
        )
        if self.chat:
            self._before, self._between, end = _chat_frame(tokenizer)
            self._leading: list[int] = []  # the chat template writes its own begin token
        else:
            self._before, self._between, end = "", "\n", tokenizer.eos_token
            first = tokenizer("a").input_ids[:1]
            self._leading = first if first == [tokenizer.bos_token_id] else []
        self.end_id: int = tokenizer.convert_tokens_to_ids(end)
        control = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, end, *reserved}
        control -= {None, tokenizer.unk_token}
        self._control = re.compile("|".join(map(re.escape, sorted(control))))
        self.fingerprint = self._fingerprint()

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The transformers tokenizer."""
        if isinstance(self._tokenizer, bytes):
            self._tokenizer = remote_code.unpacked(self._tokenizer)
        return self._tokenizer

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__, _backend=self._backend.to_str())
        if not isinstance(self._tokenizer, bytes):
            state["_tokenizer"] = remote_code.packed(self._tokenizer, "AutoTokenizer")
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self.__dict__.update(state)
        if self.fingerprint not in _backends:
            _backends[self.fingerprint] = Tokenizer.from_str(state["_backend"])
        self._backend = _backends[self.fingerprint]

    def _fingerprint(self) -> str:
        frame = [self._before, self._between, self.end_id, self._leading, self._prompts, self.chat]
        content = self._backend.to_str() + json.dumps(frame, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def render(self, example: Example) -> Rendered:
        """Segments of prompt and answer. Raises BadExample, or UserError without a prompt."""
        instruction = example.instruction
        if instruction is None:
            if example.task not in self._prompts:
                raise UserError(
                    f"data.prompts: has no entry for task {example.task!r}, and example "
                    f"{example.id} brings no instruction: add {example.task}: TEXT to data.prompts"
                )
            instruction = self._prompts[example.task]
        question: list[Part] = [instruction] if instruction else []
        given = [part for part in example.input if part != ""]
        if question and given:
            question.append("\n")
        question += given
        for part in (*question, *example.output):
            if isinstance(part, str) and (match := self._control.search(part)):
                raise BadExample(f"its text contains {match[0]}, a token that steers the model")
        newline = self._between if question or self.chat else ""
        prompt = self._segments([self._before, *question, newline])
        if self._leading:
            prompt.insert(0, np.array(self._leading, np.int32))
        answer = list(example.output)
        if example.task == "asr" and example.lang:
            answer.insert(0, f"{example.lang}\t")
        return Rendered(prompt, [*self._segments(answer), np.array([self.end_id], np.int32)])

    def _segments(self, parts: Iterable[Part]) -> list[Segment]:
        """Text between other parts is joined first, then tokenized in one piece."""
        segments: list[Segment] = []
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            segments += self._tokenized(text)
            segments.append(part)
            text = ""
        return segments + self._tokenized(text)

    def _tokenized(self, text: str) -> list[Segment]:
        if not text:
            return []
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # `tokenizers` raises nothing more special
            raise BadExample(f"its text cannot be tokenized: {error}") from error
        return [np.array(ids, np.int32)]


def _chat_frame(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str, str]:
    """Text before the question, text between question and answer, and the end token's name."""
    import jinja2

    if tokenizer.chat_template is None:
        raise UserError(
            "data.template: chat, but the tokenizer has no chat template: "
            "set data.template to plain, or add a chat template to the tokenizer"
        )
    turns = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
    ]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"data.template: the tokenizer's chat template failed ({error}): set it to plain"
        ) from error
    before, found_question, rest = text.partition(_QUESTION)
    between, found_answer, after = rest.partition(_ANSWER)
    if not found_question or not found_answer or _QUESTION in after or _ANSWER in after:
        raise UserError(
            "data.template: the tokenizer's chat template does not show a question and its answer "
            "once each, in this order: set data.template to plain"
        )
    return before, between, _end_token(tokenizer, after)


def _end_token(tokenizer: PreTrainedTokenizerFast, after: str) -> str:
    """The first special token behind the answer, or the tokenizer's end token."""
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = tokenizer.backend_tokenizer.encode(after, add_special_tokens=False).tokens
    return next((token for token in tokens if token in specials), tokenizer.eos_token)
