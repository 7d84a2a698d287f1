"""What the decoders of the other types (`types`) are given before a text.

    moonshine    <s> the text </s>
    speech_to_text   </s> the text </s>
    cohere_asr   ▁<|startofcontext|><|startoftranscript|><|emo:undefined|><|de|><|de|><|pnc|>
                 <|noitn|><|notimestamp|><|nodiarize|> the text <|endoftext|>
    canary       the same without ▁; of a translation the second language is <|en|>

Ids are those of transformers' processors: of `get_decoder_prompt_ids` and of the chat template,
with punctuation, as they ask where they are told nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from raysft.errors import BadExample, UserError
from raysft.families.seq2seq.prompt import ENGLISH, LANGUAGE, Prompt, translates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of a Canary that has no chat template of its own: as that of NVIDIA's checkpoints reads.
TEMPLATE = (
    "{%- for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}<|startofcontext|><|startoftranscript|><|emo:undefined|>"
    "<|{{ part['source_language'] }}|><|{{ part['target_language'] }}|>"
    "{{ '<|pnc|>' if part['punctuation'] else '<|nopnc|>' }}<|noitn|><|notimestamp|><|nodiarize|>"
    "{% endif %}{% endfor %}{% endfor %}"
)


class Saved(Protocol):
    """What an export has beside its model."""

    def save_pretrained(self, folder: Path) -> object: ...


class Processor(Saved, Protocol):
    """What is asked of a processor of transformers, where it has it."""

    tokenizer: PreTrainedTokenizerFast

    def get_decoder_prompt_ids(self, language: str) -> list[int | None]: ...

    def apply_transcription_request(
        self,
        audio: list[np.ndarray],
        source_language: list[str],
        target_language: list[str],
        tokenize: bool,
    ) -> list[str]: ...


class Untold(Prompt):
    """A start token: the model is told neither language nor task."""

    def __init__(
        self,
        processor: Processor,
        kind: str,
        language: str | None,
        own: str | None,
        kept: str | None,
    ) -> None:
        """As `Told`. Raises UserError for a tokenizer without a start token, and a language."""
        super().__init__(processor.tokenizer)
        self.kind, self.codes = kind, []
        if language is not None:
            raise UserError(
                f"data.language: {kind} is not told which language is spoken: leave it out"
            )
        start = self._start(processor.tokenizer)
        if start is None:
            raise UserError(
                "model.tokenizer: it has no start token (bos_token): name the tokenizer of a "
                f"{kind} model"
            )
        self.start_id = self._id(start)
        self._keep(start, self.start_id, kept)

    def _start(self, tokenizer: PreTrainedTokenizerFast) -> str | None:
        """The start token, if it has one."""
        return tokenizer.bos_token

    def prefix(self, task: str, lang: str | None) -> list[int]:
        """As `Prompt.prefix`; whatever language it is."""
        if translates(task):
            raise UserError(
                f"model: {self.kind} is not told its task and is trained to transcribe alone, not "
                f"on task {task!r}"
            )
        return [self.start_id]


class Ended(Untold):
    """The end token, with which Speech2Text begins too. Whether it writes what is spoken, or a
    translation, follows from what it is trained on."""

    def _start(self, tokenizer: PreTrainedTokenizerFast) -> str | None:
        """The end token. Raises UserError for a tokenizer of several languages."""
        several = next((name for name in tokenizer.get_vocab() if name.startswith("<lang:")), None)
        if several is not None:
            raise UserError(
                f"model.tokenizer: it has {several}: a {self.kind} that is told its language is "
                "not trained here; use one of a single language, or another model (whisper, canary)"
            )
        return tokenizer.eos_token

    def prefix(self, task: str, lang: str | None) -> list[int]:
        """As `Prompt.prefix`; whatever language it is, and whatever task."""
        translates(task)
        return [self.start_id]


class Told(Prompt):
    """Tokens in a fixed order, the language among them."""

    def __init__(
        self,
        processor: Processor,
        kind: str,
        language: str | None,
        own: str | None,
        kept: str | None,
    ) -> None:
        """kind: the model type. language: data.language, of examples that name none. own: that of
        the model's generation config; None: it has none. kept: `source` of a run which began
        before.

        Raises UserError for a tokenizer that lacks a token, a language that it does not know, and
        where the run began with another prompt.
        """
        super().__init__(processor.tokenizer)
        self.kind = kind
        self.codes = [code for code in self._spoken_by(processor) if self._has(code)]
        if not self.codes:
            raise UserError(
                "model.tokenizer: it has no token of a language, such as <|en|>: name the "
                f"tokenizer of a {kind} model"
            )
        self._choose_default(language, own)
        self._prefixes = self._all(processor)
        first = next(iter(self._prefixes.values()))
        self.start_id = first[0]
        names = processor.tokenizer.convert_ids_to_tokens(first)
        shown = ["LANGUAGE" if name == f"<|{self.codes[0]}|>" else name for name in names]
        self._keep("".join(shown), sorted(self._prefixes.items()), kept)

    @abstractmethod
    def _spoken_by(self, processor: Processor) -> list[str]:
        """Codes of the languages that the processor knows."""

    @abstractmethod
    def _all(self, processor: Processor) -> dict[str, list[int]]:
        """The ids of a prefix, by the languages of speech and text: `en de`."""


class Transcribing(Told):
    """Of Cohere ASR, which writes what is spoken, in its language."""

    def _spoken_by(self, processor: Processor) -> list[str]:
        from transformers.models.cohere_asr.processing_cohere_asr import LANGUAGES

        return sorted(LANGUAGES)

    def _all(self, processor: Processor) -> dict[str, list[int]]:
        found = {}
        for code in self.codes:
            ids = processor.get_decoder_prompt_ids(code)
            unknown = (None, processor.tokenizer.unk_token_id)
            if any(token in unknown for token in ids):
                at = next(i for i, token in enumerate(ids) if token in unknown)
                raise UserError(
                    f"model.tokenizer: it has no token for part {at + 1} of the prompt of "
                    f"{type(processor).__name__}: name the tokenizer of a {self.kind} model"
                )
            found[f"{code} {code}"] = [int(token) for token in ids if token is not None]
        return found

    def prefix(self, task: str, lang: str | None) -> list[int]:
        """As `Prompt.prefix`."""
        if translates(task):
            raise UserError(
                f"model: {self.kind} writes what is spoken and cannot be trained on task {task!r}, "
                "to translate; use another model (whisper, canary)"
            )
        code = self._spoken(lang)
        return self._prefixes[f"{code} {code}"]


class FromTo(Told):
    """Of Canary, which is told the languages of the speech and of the text."""

    def _spoken_by(self, processor: Processor) -> list[str]:
        from transformers.models.canary.processing_canary import LANGUAGE_CODE_TO_NAME

        return list(LANGUAGE_CODE_TO_NAME)

    def _all(self, processor: Processor) -> dict[str, list[int]]:
        pairs = [(code, code) for code in self.codes]
        if ENGLISH in self.codes:
            pairs += [(code, ENGLISH) for code in self.codes if code != ENGLISH]
        spoken, written = ([pair[i] for pair in pairs] for i in (0, 1))
        clips = [np.zeros(1, np.float32)] * len(pairs)
        texts = processor.apply_transcription_request(clips, spoken, written, tokenize=False)
        found = {}
        for pair, text in zip(pairs, texts, strict=True):
            ids = processor.tokenizer(text).input_ids
            strange = [token for token in ids if token not in self._added]
            if strange:
                name = processor.tokenizer.convert_ids_to_tokens(strange[0])
                raise UserError(
                    f"model.tokenizer: of {text} {name!r} is no control token: name the tokenizer "
                    f"of a {self.kind} model"
                )
            found[" ".join(pair)] = [int(token) for token in ids]
        return found

    def prefix(self, task: str, lang: str | None) -> list[int]:
        """As `Prompt.prefix`."""
        translate, code = translates(task), self._spoken(lang)
        if not translate:
            return self._prefixes[f"{code} {code}"]
        if code == ENGLISH:
            raise BadExample(
                "is spoken in English, and translations are those into English: leave it out",
                LANGUAGE,
            )
        if f"{code} {ENGLISH}" not in self._prefixes:
            raise UserError(
                f"model.tokenizer: it has no <|{ENGLISH}|>, and translations are into English: "
                f"task {task!r} cannot be trained"
            )
        return self._prefixes[f"{code} {ENGLISH}"]
