"""What the decoder of a Whisper is given, and what it learns.

    <|startoftranscript|><|en|><|transcribe|><|notimestamps|> the text <|endoftext|>

An English-only model is told neither language nor task. Ids are those of transformers'
`WhisperTokenizer` with its prefix tokens set so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raysft.errors import BadExample, UserError
from raysft.families.seq2seq.prompt import ENGLISH, LANGUAGE, Prompt, translates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START, NO_TIMESTAMPS = "<|startoftranscript|>", "<|notimestamps|>"
TRANSCRIBE, TRANSLATE = "<|transcribe|>", "<|translate|>"


class WhisperPrompt(Prompt):
    """Tokens of language and task, of a model that is told them."""

    kind = "Whisper"

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
        super().__init__(tokenizer)
        needed = [START, NO_TIMESTAMPS, *((TRANSCRIBE, TRANSLATE) if multilingual else ())]
        self._ids = {name: self._id(name) for name in needed}
        self.start_id = self._ids[START]
        self.codes = [code for code in dict.fromkeys(self._names.values()) if self._has(code)]
        if multilingual:
            self._choose_default(language, own)
        elif language is not None and self._names.get(language.lower()) != ENGLISH:
            raise UserError(f"data.language: {language}, but the model knows English only")
        else:
            self._default = ENGLISH
        self.multilingual = multilingual
        form = f"{START}LANGUAGE TASK {NO_TIMESTAMPS}" if multilingual else START + NO_TIMESTAMPS
        self._keep(form, self._ids, kept)

    def prefix(self, task: str, lang: str | None) -> list[int]:
        """As `Prompt.prefix`."""
        translate = translates(task)
        if self.multilingual:
            spoken = self._id(f"<|{self._spoken(lang)}|>")
            asked = self._ids[TRANSLATE if translate else TRANSCRIBE]
            return [self._ids[START], spoken, asked, self._ids[NO_TIMESTAMPS]]
        if translate:
            raise UserError(
                f"model: it knows English only and cannot be trained on task {task!r}, to "
                "translate; use a multilingual one"
            )
        if lang and self._names.get(lang.lower()) != ENGLISH:
            raise BadExample(
                f"its language is {lang!r}, and the model knows English only", LANGUAGE
            )
        return [self._ids[START], self._ids[NO_TIMESTAMPS]]
