"""What a decoder is given before a text, and what it learns: tokens instead of a dialogue.

Stands where other families have a chat template, and is asked for every example, in the index and
in the data tasks. The language is the example's `lang`, which is the one that is spoken; the task
follows from the example's. The text and the end are learnt, what stands before is not. A
conversation of one question, a clip, and one answer is the same example written otherwise.

Costs 20 us an example.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from raysft.data.example import ASSISTANT, Audio, Example
from raysft.data.segments import Rendered, Segment
from raysft.data.tokenizer import HoldsTokenizer
from raysft.errors import BadExample, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TASKS = {
    **dict.fromkeys(("asr", "s2t", "transcribe"), False),
    **dict.fromkeys(("st", "s2tt", "translate", "translation"), True),
}
"""Tasks of examples -> whether they translate: those are translations into English."""
ENGLISH = "en"
LANGUAGE = "unknown language"  # the kind of reason


class Prompt(HoldsTokenizer, ABC):
    """Makes examples a clip, the tokens before their text, and their text.

    kind: model type, as messages call it. codes: of the languages that the model is told. source:
    what a run keeps of it. start_id, end_id: the tokens that begin and end what is decoded.
    remark: what a user should know of it, or "".
    """

    kind: str
    codes: list[str]
    source: str
    fingerprint: str
    start_id: int
    remark = ""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self.end_id = int(tokenizer.eos_token_id)
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        strange = {tokenizer.unk_token_id} - ends  # what its vocabulary lacks steers nothing
        self._added = frozenset(tokenizer.added_tokens_decoder) - strange
        self._names = _languages()
        self._default: str | None = None

    @abstractmethod
    def prefix(self, task: str, lang: str | None) -> list[int]:
        """Ids before the text. Raises BadExample for a language that the model does not know,
        UserError for a task that it cannot do."""

    def _keep(self, form: str, facts: object, kept: str | None) -> None:
        """Say what a prompt of this `form` is. facts: what else decides on ids; kept: `source` of a
        run which began before. Raises UserError where the run began with another prompt."""
        default = f"; without a lang: {self._default}" if self._default else ""
        self.source = f"{{# seq2seq: {form} TEXT {self.tokenizer.eos_token}{default} #}}"
        if kept not in (None, self.source):
            raise UserError(
                f"data.language: the run began with {kept}, and would go on with {self.source}; "
                "start a new run for that (run.name)"
            )
        known = json.loads(self._backend.to_str())
        del known["post_processor"]  # transformers' own prefix, as somebody has set it last
        content = json.dumps([known, [self.source, facts, self.end_id]], sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def _choose_default(self, language: str | None, own: str | None) -> None:
        """The language of examples that name none: data.language, that of the generation config
        (own), or the only one. Raises UserError for one that the model is not told."""
        for key, given in (
            ("data.language", language),
            ("model.path: language of its generation_config.json", own),
        ):
            if given is None or self._default is not None:
                continue
            self._default = self._code(given)
            if self._default is None:
                raise UserError(f"{key}: {self._unknown(given)}")
        if self._default is None and len(self.codes) == 1:
            self._default = self.codes[0]

    def _spoken(self, lang: str | None) -> str:
        """The code of an example's language. Raises BadExample where there is none."""
        code = self._code(lang) if lang else self._default
        if code is None:
            remedy = "give it a lang, or set data.language for all that name none"
            raise BadExample(
                f"its {self._unknown(lang)}" if lang else f"it names no language: {remedy}",
                LANGUAGE,
            )
        return code

    def _id(self, name: str) -> int:
        found = self._backend.token_to_id(name)
        if found is None:
            raise UserError(
                f"model.tokenizer: it has no {name}: name the tokenizer of a {self.kind} model"
            )
        return found

    def _has(self, code: str) -> bool:
        return self._backend.token_to_id(f"<|{code}|>") is not None

    def _code(self, language: str) -> str | None:
        """The code of a language that the model is told, by name or code in any case."""
        code = self._names.get(language.lower())
        return code if code in self.codes else None

    def _unknown(self, language: str) -> str:
        known = ", ".join(self.codes)
        return f"language {language!r} is unknown to the tokenizer, which has {known}"

    def render(self, example: Example) -> Rendered:
        """Clip and tokens, then text and end. Raises BadExample, or UserError where none of its
        kind can be used."""
        example = _short(example)
        answer = np.array([*self._encode(_text(example)), self.end_id], np.int32)
        return Rendered([*self.prompt(example), answer], [False, False, True])

    def prompt(self, example: Example) -> list[Segment]:
        """Clip and tokens. Raises as `render` does."""
        example = _short(example)
        clip = _clip(example)
        return [clip, np.array(self.prefix(example.task, example.lang), np.int32)]

    def _encode(self, text: str) -> list[int]:
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # `tokenizers` raises nothing more special
            raise BadExample(f"its text cannot be tokenized: {error}", "bad text") from error
        for token in ids:
            if token in self._added:
                name = self._backend.id_to_token(token)
                raise BadExample(
                    f"its text contains {name}, a token that steers the model", "bad text"
                )
        return ids

    def answer_of(self, generated: str) -> str:
        """What is generated, as it is."""
        return generated


def translates(task: str) -> bool:
    """Whether a task of examples is to translate. Raises UserError for one that is unknown."""
    if task not in TASKS:
        raise UserError(
            f"model.family: seq2seq knows the tasks {', '.join(TASKS)}, not {task!r}: set the "
            "task of the source"
        )
    return TASKS[task]


def _short(example: Example) -> Example:
    """A conversation as clip and text; others as they are. Raises UserError for one of more than a
    question and its answer."""
    if not example.turns:
        return example
    roles = [turn.role for turn in example.turns]
    first, last = example.turns[0], example.turns[-1]
    if roles != ["user", ASSISTANT] or last.learnt is False or last.calls or example.tools:
        raise UserError(
            "model.family: seq2seq takes a clip and its text, of conversations those of one "
            "question, which is a clip, and one answer, which is learnt: others need a model that "
            "hears and talks (audio_lm)"
        )
    return replace(example, turns=(), input=first.content, output=last.content)


def _clip(example: Example) -> Audio:
    """The one clip of an example. Raises as `Prompt.render`."""
    if any(not isinstance(part, str) for part in example.output):
        raise UserError(
            "model.family: seq2seq answers in text only; task tts needs causal_lm with "
            "data.speech_tokens"
        )
    clips = [part for part in example.input if isinstance(part, Audio)]
    others = [part for part in example.input if not isinstance(part, (Audio, str))]
    if others:
        raise UserError(
            "model.family: seq2seq reads audio, no speech units: sources of units need "
            "model.family: causal_lm"
        )
    if len(clips) != 1:
        raise BadExample(
            f"has {len(clips) or 'no'} clip{'s' if clips else ''}, and seq2seq reads one",
            "not one clip",
        )
    if example.instruction or any(part for part in example.input if isinstance(part, str)):
        raise BadExample(
            "brings an instruction, or text beside its clip, which seq2seq cannot be given: leave "
            "it out of the data",
            "bad text",
        )
    return clips[0]


def _text(example: Example) -> str:
    return "".join(part for part in example.output if isinstance(part, str))


def _languages() -> dict[str, str]:
    """Name or code of a language, in small letters -> its code, as transformers has them."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    return {**{code: code for code in LANGUAGES}, **TO_LANGUAGE_CODE}
