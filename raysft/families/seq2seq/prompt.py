"""What the decoder of a Whisper is given, and what it learns: tokens instead of a dialogue.

    <|startoftranscript|><|en|><|transcribe|><|notimestamps|> the text <|endoftext|>

Stands where other families have a chat template, and is asked for every example, in the index and
in the data tasks. The language is the example's `lang`, which is the one that is spoken; the task
follows from the example's. An English-only model has neither token. Ids are those of transformers'
`WhisperTokenizer` with its prefix tokens set so; of them the text and the end are learnt.

Costs 20 us an example.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from raysft.data import remote_code
from raysft.data.example import Audio, Example
from raysft.data.segments import Rendered, Segment
from raysft.errors import BadExample, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

START, NO_TIMESTAMPS = "<|startoftranscript|>", "<|notimestamps|>"
TRANSCRIBE, TRANSLATE = "<|transcribe|>", "<|translate|>"
TASKS = {
    **dict.fromkeys(("asr", "s2t", "transcribe"), TRANSCRIBE),
    **dict.fromkeys(("st", "s2tt", "translate", "translation"), TRANSLATE),
}
"""Tasks of examples. Translations are those that Whisper makes: into English."""
ENGLISH = "en"
LANGUAGE = "unknown language"  # the kind of reason


class Prompt:
    """Makes examples a clip, the tokens before their text, and their text.

    codes: of the languages that the tokenizer has tokens for. source: what a run keeps of it.
    start_id, end_id: the tokens that begin and end what is decoded. remark: what a user should
    know of it, or "".
    """

    remark = ""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        multilingual: bool,
        language: str | None,
        own: str | None,
        kept: str | None = None,
    ) -> None:
        """multilingual: whether the model is told language and task. language: data.language, of
        examples that name none. own: that of the model's generation config; None: it has none.
        kept: `source` of a run which began before.

        Raises UserError for a tokenizer without these tokens, a language that it does not know,
        and where the run began with another prompt.
        """
        self._tokenizer: PreTrainedTokenizerFast | bytes = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        needed = [START, NO_TIMESTAMPS, *((TRANSCRIBE, TRANSLATE) if multilingual else ())]
        self._ids = {name: self._id(name) for name in needed}
        self.start_id, self.end_id = self._ids[START], int(tokenizer.eos_token_id)
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._names = _languages()
        self.codes = [code for code in dict.fromkeys(self._names.values()) if self._has(code)]
        self._default: str | None = None if multilingual else ENGLISH
        if multilingual:
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
        elif language is not None and self._names.get(language.lower()) != ENGLISH:
            raise UserError(f"data.language: {language}, but the model knows English only")
        self.multilingual = multilingual
        default = f"; without a lang: {self._default}" if self._default else ""
        form = f"{START}LANGUAGE TASK {NO_TIMESTAMPS}" if multilingual else START + NO_TIMESTAMPS
        self.source = f"{{# seq2seq: {form} TEXT {tokenizer.eos_token}{default} #}}"
        if kept not in (None, self.source):
            raise UserError(
                f"data.language: the run began with {kept}, and would go on with {self.source}; "
                "start a new run for that (run.name)"
            )
        facts = [self.source, self._ids, self.end_id]
        known = json.loads(self._backend.to_str())
        del known["post_processor"]  # transformers' own prefix, as somebody has set it last
        content = json.dumps([known, facts], sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def _id(self, name: str) -> int:
        found = self._backend.token_to_id(name)
        if found is None:
            raise UserError(
                f"model.tokenizer: it has no {name}: name the tokenizer of a Whisper model"
            )
        return found

    def _has(self, code: str) -> bool:
        return self._backend.token_to_id(f"<|{code}|>") is not None

    def _code(self, language: str) -> str | None:
        """The code of a language that the tokenizer knows, by name or code in any case."""
        code = self._names.get(language.lower())
        return code if code in self.codes else None

    def _unknown(self, language: str) -> str:
        known = ", ".join(self.codes)
        return f"language {language!r} is unknown to the tokenizer, which has {known}"

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The transformers tokenizer."""
        if isinstance(self._tokenizer, bytes):
            self._tokenizer = remote_code.unpacked(self._tokenizer)
        return self._tokenizer

    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        if not isinstance(self._tokenizer, bytes):  # it takes a second of imports to unpickle
            state["_tokenizer"] = remote_code.packed(self._tokenizer, "AutoTokenizer")
        return state

    def render(self, example: Example) -> Rendered:
        """Clip and tokens, then text and end. Raises BadExample, or UserError where none of its
        kind can be used."""
        answer = np.array([*self._encode(_text(example)), self.end_id], np.int32)
        return Rendered([*self.prompt(example), answer], [False, False, True])

    def prompt(self, example: Example) -> list[Segment]:
        """Clip and tokens. Raises as `render` does."""
        clip = _clip(example)
        return [clip, np.array(self.prefix(example.task, example.lang), np.int32)]

    def prefix(self, task: str, lang: str | None) -> list[int]:
        """Ids before the text. Raises BadExample for a language that the model does not know,
        UserError for a task that it cannot do."""
        token = TASKS.get(task)
        if token is None:
            raise UserError(
                f"model.family: seq2seq knows the tasks {', '.join(TASKS)}, not {task!r}: set the "
                "task of the source"
            )
        if not self.multilingual:
            if token == TRANSLATE:
                raise UserError(
                    f"model: it knows English only and cannot be trained on task {task!r}, to "
                    "translate; use a multilingual one"
                )
            if lang and self._names.get(lang.lower()) != ENGLISH:
                raise BadExample(
                    f"its language is {lang!r}, and the model knows English only", LANGUAGE
                )
            return [self._ids[START], self._ids[NO_TIMESTAMPS]]
        code = self._code(lang) if lang else self._default
        if code is None:
            remedy = "give it a lang, or set data.language for all that name none"
            raise BadExample(
                f"its {self._unknown(lang)}" if lang else f"it names no language: {remedy}",
                LANGUAGE,
            )
        spoken = self._id(f"<|{code}|>")
        return [self._ids[START], spoken, self._ids[token], self._ids[NO_TIMESTAMPS]]

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


def _clip(example: Example) -> Audio:
    """The one clip of an example. Raises as `Prompt.render`."""
    if example.turns:
        raise UserError(
            "model.family: seq2seq takes a clip and its text, no conversations: they need a model "
            "that hears and talks (audio_lm)"
        )
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
