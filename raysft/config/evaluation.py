"""The section of the config that says when and how a model is evaluated: `evaluate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from raysft.config.marks import Free, OneOf, PathKey, one_of
from raysft.config.prepare import Speakers
from raysft.config.section import Section
from raysft.scorers import by_task, text_figures

_READ = PathKey(read=True)

Normalization = Literal[
    "lower", "punctuation", "whitespace", "numbers", "whisper_basic", "whisper_english"
]
_MADE_EQUAL: tuple[Normalization, ...] = ("lower", "punctuation", "whitespace")
_BLEU_WORDS = ("13a", "intl", "zh", "char", "ja-mecab", "ko-mecab", "none")  # sacrebleu's names


class Evaluate(Section):
    """Evaluation on data.eval."""

    every: Free[NonNegativeInt] = Field(0, description="steps between evaluations; 0: never")
    at_end: Free[bool] = Field(True, description="evaluate after the last step")
    beside: Free[bool] = Field(
        False,
        description="training goes on meanwhile: a checkpoint of the step is saved, and workers of "
        "their own evaluate it",
    )
    workers: Free[PositiveInt] = Field(
        1, description="of evaluate.beside; each with a GPU, where those that train have one"
    )
    tokens_per_batch: Free[PositiveInt] = Field(8192, description="budget of an evaluation batch")
    max_examples: Free[PositiveInt | None] = Field(
        None, description="examples of each source used while training (all at the end)"
    )
    max_new_tokens: Free[PositiveInt | None] = Field(
        None,
        description="longest answer generated; default: half as long again as the longest "
        "reference of the batch",
    )
    generate: Free[bool] = Field(
        True, description="generate answers and compare them with references, not only the loss"
    )
    metrics: Free[dict[str, list[Annotated[str, OneOf(text_figures)]]]] = Field(
        default_factory=dict,
        description="what answers are measured by, by task, e.g. {chat: [chrf], asr: [wer]}; tasks "
        f"that are not named here: {by_task()}; others are not answered",
    )
    bleu_tokenize: Free[str | dict[str, str]] = Field(
        "13a",
        description="what words are for BLEU, as sacrebleu names it: zh or char for Chinese, "
        "ja-mecab or ko-mecab where they are installed, else 13a or intl; or by source, e.g. "
        "{en_zh: zh}, 13a for the others",
    )
    normalize: Free[list[Normalization]] = Field(
        default_factory=lambda: list(_MADE_EQUAL),
        description="what is made equal in both texts before WER, CER and accuracy: case, "
        "punctuation, spaces; numbers: digits of any script, and English number words; or one of "
        "Whisper's normalisers, alone",
    )
    spelling: Free[Annotated[str | None, _READ]] = Field(
        None,
        description="whisper_english: a JSON file {british: american, ...} of spellings made equal",
    )

    asr: Free[Annotated[str | None, PathKey("model")]] = Field(
        None,
        description="a run that transcribes, an exported folder or a hub id: at the end, what the "
        "model speaks of data.eval is heard by it, and WER and CER of that are measured, and of "
        "the real clips by way of the same vocoder",
    )
    speakers: Free[Speakers | None] = Field(
        None, description="what tells who speaks: how alike what is spoken is to the real clip"
    )
    speak_examples: Free[PositiveInt] = Field(
        40, description="examples of each task that are spoken for these, evenly over data.eval"
    )

    @field_validator("bleu_tokenize", mode="plain")
    @classmethod
    def _known_words(cls, value: Any) -> str | dict[str, str]:
        names = list(value.values()) if isinstance(value, dict) else [value]
        if not all(name in _BLEU_WORDS for name in names):
            known = one_of([repr(name) for name in _BLEU_WORDS])
            raise ValueError(f"{known}, or one of them by source")
        return value

    @property
    def speaks(self) -> bool:
        """Whether what a model speaks is measured."""
        return self.asr is not None or self.speakers is not None

    @property
    def apart(self) -> int:
        """Workers that evaluate beside those that train."""
        return self.workers if self.beside and self.every else 0
