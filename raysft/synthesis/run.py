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
from raysft.config.speaking import Speak
from raysft.data import scripts
from raysft.data.clips.audio import load as decode
from raysft.data.example import ASSISTANT, Audio, Example, Turn, Units
from raysft.data.example import Sequence as Encoded
from raysft.data.tokenizer import unit_pattern
from raysft.errors import BadExample, UserError
from raysft.synthesis.dialog import Replies, Reply
from raysft.synthesis.vocoders import GRIFFIN_LIM, Decoder, Raw, Vocoder, vocoder_of
from raysft.synthesis.voices import Voices, heard
from raysft.transcribe.model import Answering

AT_A_TIME = 16  # answers that are said together
MOST_UNITS_PER_S = 60  # that a language model writes for a second
SPOKEN = Audio("what is to be spoken")  # stands for a clip that is not there yet


@dataclass(frozen=True)
class Utterance:
    """What was said, or in `error` why nothing was. wave: float32 [samples] at `rate`; of a model
    that speaks latents which nothing makes waves of, `latents`: float32 [frames, width], `rate` of
    them a second. heard: of a dialog, what the user said, as the model heard it."""

    id: str
    text: str
    wave: np.ndarray
    rate: float
    error: str = ""
    heard: str = ""
    latents: np.ndarray | None = None

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.wave if self.latents is None else self.latents) / self.rate


@dataclass(frozen=True)
class Shown:
    """A voice that is to be spoken in: the path of a clip, and what it says."""

    path: str
    text: str


def cloned(text: str, task: str, voice: Shown, name: str = "") -> Example:
    """An example that asks for `text` to be said in a voice."""
    shown = Turn("system", (voice.text, Audio(voice.path)))
    turns = (shown, Turn("user", (text,)), Turn(ASSISTANT, (SPOKEN,)))
    return Example(name or text, task, (), (), turns=turns, script=scripts.CLONE, text=text)


def replied(path: str, name: str) -> Example:
    """An example that asks for a spoken reply to the clip at `path`."""
    turns = (Turn("user", (Audio(path),)),)
    return Example(name, scripts.DIALOG, (), (), turns=turns, script=scripts.DIALOG)


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
        language model writes; default: the model's own, where it has one (a pair). Raises UserError
        for a model that does not speak, a decoder beside one that does, and a vocoder that does not
        go with it."""
        self.name = answering.name
        self._answering, self._asked = answering, asked
        decoder = decoder or answering.speaker
        self._speaking = answering if decoder is None else decoder
        self._settings = settings or answering.config.speak
        self.vocoder = voice_of(self._speaking, self._settings.vocoder)
        self._units = None if decoder is None else _units_of(answering, decoder)
        self._voices = Voices(self._settings, answering.encoder.limits)
        self._replies: Replies | None = None
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
        for place, (prompt, reply) in enumerate(self._prompts(asked)):
            if reply is not None:
                found[place] = replace(found[place], text=reply.said, heard=reply.heard)
            if isinstance(prompt, BadExample):
                found[place] = replace(found[place], error=f"{asked[place].id}: {prompt}")
                self.failed += 1
            else:
                prompts[place] = prompt
        seeds = [seed_of(asked[place].id, self._settings.seed) for place in prompts]
        with torch.no_grad(), self._speaking.autocast():  # shards may be gathered here
            model = self._speaking.speech_model
            frames = model.speak(list(prompts.values()), seeds, self._settings)
        for place, spoken in zip(prompts, frames, strict=True):
            if isinstance(self.vocoder, Raw):
                found[place] = replace(found[place], latents=self.vocoder(spoken))
            else:
                found[place] = replace(found[place], wave=self.vocoder(spoken))
        return found

    def _prompts(self, asked: Sequence[Example]) -> list[tuple[Encoded | BadExample, Reply | None]]:
        """What the model that speaks is asked: of a flow decoder, the units that the language model
        beside it writes; and the reply to a dialog."""
        if self._units is None:
            return [(self._asked_alone(example), None) for example in asked]
        most = max(1, int(self._settings.max_seconds * MOST_UNITS_PER_S))
        replies = self._answered([one for one in asked if one.script == scripts.DIALOG], most)
        others = self._written([one for one in asked if one.script != scripts.DIALOG], most)
        found: list[tuple[Encoded | BadExample, Reply | None]] = []
        for example in asked:
            reply = next(replies) if example.script == scripts.DIALOG else None
            units = next(others) if reply is None else reply.error or reply.units
            prompt = units if isinstance(units, BadExample) else self._sounding(example, units)
            found.append((prompt, reply))
        return found

    def _asked_alone(self, example: Example) -> Encoded | BadExample:
        """What a model that speaks by itself is asked."""
        if example.script and not self._answering.encoder.writes:
            return BadExample(
                f"is a {example.script}: what is said in it is a language model's to write; name "
                "that, and this one as its decoder",
                "malformed record",
            )
        return _prompt(self._answering, example)

    def _answered(self, asked: Sequence[Example], most: int) -> Iterator[Reply]:
        """Replies to dialogs."""
        if not asked:
            return iter(())
        if self._replies is None:
            self._replies = Replies(self._answering, self._heard)
        return iter(self._replies(asked, most))

    def _written(
        self, asked: Sequence[Example], most: int
    ) -> Iterator[tuple[int, ...] | BadExample]:
        """The units that the language model writes."""
        assert self._units is not None
        found = [self._heard(self._answering, example) for example in asked]
        good = [one for one in found if not isinstance(one, BadExample)]
        texts = iter(self._answering.generate(good, most) if good else ())
        for one in found:
            if isinstance(one, BadExample):
                yield one
            else:
                yield tuple(int(number) for number in self._units.findall(next(texts)))

    def _heard(self, answering: Answering, example: Example) -> Encoded | BadExample:
        """What a language model is asked, its clips heard by speak.speech_tokens."""
        try:
            return _prompt(answering, self._voices.heard(example))
        except BadExample as error:
            return error

    def _sounding(self, example: Example, units: tuple[int, ...]) -> Encoded | BadExample:
        """What the flow decoder is asked: units, in the voice that is heard."""
        try:
            voice = example.voice
            if not voice and example.script != scripts.DIALOG:  # whose clip is another's
                voice = self._voices.embedding(example)
        except BadExample as error:
            return error
        asked = replace(
            example, input=(Units(units),), output=(SPOKEN,), turns=(), script="", voice=voice
        )
        found = _prompt(self._speaking, asked)
        shown = heard(example) and example.script != scripts.DIALOG
        if isinstance(found, BadExample) and not voice and shown:
            return BadExample(f"{found} (speak.speakers makes one of the clip)", found.kind)
        return found


def _prompt(answering: Answering, example: Example) -> Encoded | BadExample:
    encoder = answering.encoder
    rate = encoder.sample_rate
    try:
        clips = []
        if rate is not None:
            clips = [decode(clip, rate, encoder.limits) for clip in heard(example)]
        return encoder.speaking(example, clips)
    except BadExample as error:
        return error


def _units_of(answering: Answering, decoder: Answering) -> re.Pattern[str]:
    """What finds the units in a text that the language model writes. Raises UserError where it
    writes none, the decoder is none, or their units are not the same."""
    if not answering.encoder.units:
        raise UserError(
            f"{answering.name}: its model writes no units for {decoder.name} to speak: name a run "
            "with data.speech_tokens or model.speech_units"
        )
    if decoder.encoder.writes:
        raise UserError(f"--decoder: {decoder.name} is no flow decoder")
    written, spoken = answering.encoder.speech_tokens, decoder.encoder.speech_tokens
    if written and spoken and written.fingerprint() != spoken.fingerprint():
        raise UserError(
            f"--decoder: {decoder.name} learnt other units than {answering.name} writes: their "
            "speech tokenizers differ; train both with one data.speech_tokens.path, or as stages"
        )
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


def voice_of(answering: Answering, vocoder: str) -> Vocoder | Raw:
    """What makes waves of what a model speaks: `speak.vocoder`, or the decoder of the codec whose
    latents it speaks; where there is none, what gives latents as the data has them. Raises
    UserError where it speaks nothing, or they do not go together."""
    encoder = answering.encoder
    if encoder.sounds is not None:
        return vocoder_of(vocoder, encoder.sounds)
    if encoder.waves is None and encoder.raw is None:
        raise UserError(
            f"{answering.name}: its model writes text and does not speak; name a run of a family "
            "that does (patch_lm, pair), or a flow decoder that speaks its units (--decoder)"
        )
    if vocoder != GRIFFIN_LIM:
        raise UserError(
            f"speak.vocoder: {vocoder}, but {answering.name} speaks latents of a codec, whose own "
            "decoder makes waves of them (model.patches.codec): leave it out"
        )
    if encoder.waves is not None:
        return Decoder(encoder.waves, int(encoder.spoken_rate))
    assert encoder.raw is not None
    return Raw(encoder.raw, encoder.spoken_rate)


def seed_of(name: str, seed: int) -> int:
    """Of the noise of what is called `name`, whatever else is said."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass"), seed & 0xFFFFFFFF) | seed >> 32 << 32
