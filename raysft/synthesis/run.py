"""What is asked to be said -> waves, in order, several at a time."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import ValidationError

from raysft.config import Config
from raysft.config.explain import mistakes
from raysft.config.load import apply_override
from raysft.config.mel import Mel
from raysft.config.speaking import Speak
from raysft.data.clips.audio import load as decode
from raysft.data.example import Audio, Example, Units
from raysft.data.example import Sequence as Encoded
from raysft.data.tokenizer import unit_pattern
from raysft.errors import BadExample, UserError
from raysft.synthesis.vocoders import Vocoder, vocoder_of
from raysft.transcribe.model import Answering

AT_A_TIME = 16  # answers that are said together
MOST_UNITS_PER_S = 60  # that a language model writes for a second
SPOKEN = Audio("what is to be spoken")  # stands for a clip that is not there yet


@dataclass(frozen=True)
class Utterance:
    """What was said, or in `error` why nothing was. wave: float32 [samples] at `rate`."""

    id: str
    text: str
    wave: np.ndarray
    rate: int
    error: str = ""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.wave) / self.rate


def asked_of(text: str, task: str, speaker: str | None = None, name: str = "") -> Example:
    """An example that asks for `text` to be said. speaker: path of a clip that is heard before."""
    heard = () if speaker is None else (Audio(speaker),)
    return Example(name or text, task, (*heard, text), (SPOKEN,), text=text)


class Utterances:
    """Iterates once over what is said of `asked`, in order, in batches of AT_A_TIME."""

    def __init__(
        self,
        answering: Answering,
        asked: Sequence[Example],
        settings: Speak | None = None,
        decoder: Answering | None = None,
    ) -> None:
        """settings: default: the run's. decoder: the flow decoder that speaks the units that a
        language model writes. Raises UserError for a model that does not speak, a decoder beside
        one that does, and a vocoder that does not go with it."""
        self.name = answering.name
        self._answering, self._asked = answering, asked
        self._speaking = answering if decoder is None else decoder
        self._settings = settings or answering.config.speak
        self.mel = spoken_by(self._speaking)
        self._units = None if decoder is None else _units_of(answering, decoder)
        self.vocoder: Vocoder = vocoder_of(self._settings.vocoder, self.mel)
        self.failed = 0

    def __len__(self) -> int:
        return len(self._asked)

    def __iter__(self) -> Iterator[Utterance]:
        for start in range(0, len(self._asked), AT_A_TIME):
            yield from self._said(self._asked[start : start + AT_A_TIME])

    def _said(self, asked: Sequence[Example]) -> list[Utterance]:
        silent = np.zeros(0, np.float32)
        found = [Utterance(one.id, one.text or "", silent, self.vocoder.rate) for one in asked]
        prompts: dict[int, Encoded] = {}
        for place, prompt in enumerate(self._prompts(asked)):
            if isinstance(prompt, BadExample):
                found[place] = replace(found[place], error=f"{asked[place].id}: {prompt}")
                self.failed += 1
            else:
                prompts[place] = prompt
        seeds = [seed_of(asked[place].id, self._settings.seed) for place in prompts]
        with torch.inference_mode(), self._speaking.autocast():
            model = self._speaking.speech_model
            frames = model.speak(list(prompts.values()), seeds, self._settings)
        for place, spoken in zip(prompts, frames, strict=True):
            found[place] = replace(found[place], wave=self.vocoder(spoken))
        return found

    def _prompts(self, asked: Sequence[Example]) -> list[Encoded | BadExample]:
        """What the model that speaks is asked: of a flow decoder, the units that the language model
        beside it writes."""
        found = [_prompt(self._answering, example) for example in asked]
        if self._units is None:
            return found
        good = {place: one for place, one in enumerate(found) if not isinstance(one, BadExample)}
        most = max(1, int(self._settings.max_seconds * MOST_UNITS_PER_S))
        texts = self._answering.generate(list(good.values()), most)
        for place, text in zip(good, texts, strict=True):
            units = Units(tuple(int(number) for number in self._units.findall(text)))
            written = replace(asked[place], input=(units,), output=(SPOKEN,))
            found[place] = _prompt(self._speaking, written)
        return found


def _prompt(answering: Answering, example: Example) -> Encoded | BadExample:
    encoder = answering.encoder
    heard = [part for part in example.input if isinstance(part, Audio)]
    rate = encoder.sample_rate
    try:
        clips = [] if rate is None else [decode(clip, rate, encoder.limits) for clip in heard]
        return encoder.prompt(example, clips)
    except BadExample as error:
        return error


def _units_of(answering: Answering, decoder: Answering) -> re.Pattern[str]:
    """What finds the units in a text that the language model writes. Raises UserError where it
    writes none, or the decoder is none."""
    if not answering.encoder.units:
        raise UserError(
            f"{answering.name}: its model writes no units for {decoder.name} to speak: name a run "
            "with data.speech_tokens or model.speech_units"
        )
    if decoder.encoder.writes:
        raise UserError(f"--decoder: {decoder.name} is no flow decoder")
    return unit_pattern(answering.config.model.unit_token)


def settings_of(answering: Answering, overrides: Sequence[str]) -> Speak:
    """How a run speaks, with `speak.KEY=VALUE`. Raises UserError for other keys, and values that
    cannot be."""
    for override in overrides:
        if not override.startswith("speak."):
            raise UserError(f"{override}: only keys of speak can be set here, speak.KEY=VALUE")
    tree = {"speak": answering.config.speak.model_dump()}
    for override in overrides:
        apply_override(tree, override)
    try:
        return Config.model_validate(tree).speak
    except ValidationError as error:
        first, *_ = mistakes(error.errors()).values()
        raise UserError(first) from None


def spoken_by(answering: Answering) -> Mel:
    """The mel spectrograms that a model speaks. Raises UserError where it speaks none."""
    mel = answering.encoder.sounds
    if mel is None:
        raise UserError(
            f"{answering.name}: its model writes text and does not speak; name a run of a family "
            "that does (patch_lm), or a flow decoder that speaks its units (--decoder)"
        )
    return mel


def seed_of(name: str, seed: int) -> int:
    """Of the noise of what is called `name`, whatever else is said."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass"), seed & 0xFFFFFFFF) | seed >> 32 << 32
