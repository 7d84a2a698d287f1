"""Answers to what is asked, batched by length, in the order in which it was asked.

Clips are measured by their headers, some hundred at a time, and those of like length answered
together: a batch holds as many as `batch_seconds` divided by its longest. One at a time they have
the same answers (see `SpeechModel.generate`). Memory: the clips of one batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from raysft.data.clips.audio import load as decode
from raysft.data.clips.audio import probe
from raysft.data.clips.stalled import ClipReader
from raysft.data.example import Audio, Example
from raysft.data.example import Sequence as Encoded
from raysft.data.text import NoInstruction
from raysft.errors import BadExample, UserError
from raysft.evaluate.answers import MOST_NEW_TOKENS, keeps_tab, transcript
from raysft.evaluate.run import measured
from raysft.scorers import Answer
from raysft.transcribe.asked import Asked
from raysft.transcribe.model import Answering

BATCH_SECONDS = 120.0
WINDOW = 256  # asked at a time: sorted by length, and answered before the next
# Tokens that an answer may have, where nothing says so: more than is said in the seconds of a clip,
# in a tokenizer of bytes too, and room for an answer that is no transcript.
_TOKENS, _TOKENS_PER_S = 256, 24

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Transcript:
    """An answer, or in `error` why there is none.

    path: of the clip, as it was named. id: of the example, of a clip its path. seconds: of audio.
    reference: what a manifest says is right. source: the manifest's name, or a folder's.
    """

    path: str
    id: str
    text: str
    seconds: float
    task: str = "asr"
    lang: str | None = None
    reference: str | None = None
    source: str = ""
    error: str = ""

    def line(self) -> str:
        """As a line of JSON."""
        names = ("path", "id", "text", "seconds", *("reference",) * (self.reference is not None))
        return json.dumps({name: getattr(self, name) for name in names}, ensure_ascii=False)


class Transcripts:
    """Iterates once over the transcripts of `asked`, each as soon as those before it are there."""

    def __init__(
        self,
        answering: Answering,
        asked: Sequence[Asked],
        batch_seconds: float = BATCH_SECONDS,
        max_new_tokens: int | None = None,
    ) -> None:
        """batch_seconds: of audio, padding included, that is answered at a time. max_new_tokens: of
        an answer; None: evaluate.max_new_tokens of a run, else by the length of the clips."""
        self.name = answering.name
        self._answering, self._asked = answering, asked
        self._batch_seconds = batch_seconds
        self._most = max_new_tokens or answering.config.evaluate.max_new_tokens
        self._clips = ClipReader(answering.encoder.limits)
        self._langs = {a.example.lang for a in asked if a.example is not None and a.example.lang}
        self._spaced = not keeps_tab(answering.speech_model.tokenizer)
        self._compared: list[Answer] = []
        self.failed = 0
        if answering.encoder.sample_rate is None and any(map(_hears, asked)):
            raise UserError(
                f"{self.name}: its model reads no audio; name a run or a model that does, or a run "
                "with data.speech_tokens"
            )

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def unended(self) -> int:
        """Answers so far that were cut where they had as many tokens as they might have."""
        return self._answering.speech_model.unended

    def __iter__(self) -> Iterator[Transcript]:
        for start in range(0, len(self._asked), WINDOW):
            for one in self._window(self._asked[start : start + WINDOW]):
                self.failed += bool(one.error)
                if one.reference is not None and not one.error:
                    self._compared.append(_answer(one))
                yield one

    def figures(self) -> dict[str, float]:
        """What the transcripts so far that have a reference are measured by, as an evaluation names
        it: wer/SOURCE."""
        return measured(self._compared, self._answering.config.evaluate)

    def _window(self, asked: Sequence[Asked]) -> list[Transcript]:
        found = [_unanswered(one) for one in asked]
        examples = {place: a.example for place, a in enumerate(asked) if a.example is not None}
        lengths: dict[int, float] = {}
        for place, example in examples.items():
            try:
                lengths[place] = self._seconds(example)
            except BadExample as error:
                found[place] = _failed(found[place], error)
        for places in batches(lengths, self._batch_seconds):
            prompts: dict[int, Encoded] = {}
            for place in places:
                try:
                    clips = self._clips_of(examples[place])
                    prompts[place] = self._prompt(examples[place], clips)
                except BadExample as error:
                    found[place] = _failed(found[place], error)
            texts = self._answering.generate(list(prompts.values()), self._limit(prompts))
            for place, text in zip(prompts, texts, strict=True):
                said, seconds = found[place], round(lengths[place], 3)
                if said.task == "asr" and self._answering.encoder.says_language:
                    text = transcript(text, said.lang, self._langs, self._spaced)
                found[place] = replace(said, text=text, seconds=seconds)
        return found

    def _seconds(self, example: Example) -> float:
        """Of audio, by its headers."""
        measure = partial(probe, limits=self._answering.encoder.limits)
        probed = (self._call(measure, clip) for clip in example.audio())
        return sum((one.samples / one.rate for one in probed), 0.0)

    def _clips_of(self, example: Example) -> list[np.ndarray]:
        encoder = self._answering.encoder
        if encoder.sample_rate is None:
            return []
        load = partial(decode, rate=encoder.sample_rate, limits=encoder.limits)
        return [self._call(load, clip) for clip in example.audio()]

    def _call(self, function: Callable[[Audio], _Read], clip: Audio) -> _Read:
        """function(clip). Storage that fails is the clip's misfortune: others may lie elsewhere."""
        try:
            return self._clips.call(function, clip)
        except UserError as error:
            raise BadExample(str(error), "unreadable") from error

    def _prompt(self, example: Example, clips: list[np.ndarray]) -> Encoded:
        encoder = self._answering.encoder
        try:
            prompt = encoder.prompt(example, clips)
        except NoInstruction as error:
            known = ", ".join(self._answering.config.data.prompts)
            raise UserError(
                f"--task {example.task}: {self.name} has no instruction for it (it has some for "
                f"{known}); give one by --prompt"
            ) from error
        taken = len(prompt.input_ids)
        if encoder.positions is not None and taken > encoder.positions:
            raise BadExample(
                f"takes {taken} positions, and the model has learned {encoder.positions}",
                "beyond learned positions",
            )
        return prompt

    def _limit(self, prompts: dict[int, Encoded]) -> int:
        if self._most is not None:
            return self._most
        longest = max((prompt.seconds for prompt in prompts.values()), default=0.0)
        return min(_TOKENS + math.ceil(_TOKENS_PER_S * longest), MOST_NEW_TOKENS)


def batches(lengths: dict[int, float], most: float) -> Iterator[list[int]]:
    """What to answer together: keys of `lengths`, by length, n x longest <= most (seconds; one of
    less than a second, as of a text alone, counts as one). What is longer is alone."""
    batch: list[int] = []
    for place in sorted(lengths, key=lambda place: lengths[place]):
        if batch and (len(batch) + 1) * max(1.0, lengths[place]) > most:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _hears(asked: Asked) -> bool:
    return asked.example is not None and bool(asked.example.audio())


def _unanswered(one: Asked) -> Transcript:
    found = Transcript(one.path, one.id, "", 0.0, source=one.source, error=one.error)
    if one.example is None:
        return found
    task, lang = one.example.task, one.example.lang
    return replace(found, task=task, lang=lang, reference=one.reference)


def _failed(one: Transcript, error: BadExample) -> Transcript:
    said = str(error)
    return replace(one, error=said if one.path in said else f"{one.path}: {said}")


def _answer(one: Transcript) -> Answer:
    assert one.reference is not None
    return Answer(one.id, one.source, one.task, one.lang, one.reference, one.text)
