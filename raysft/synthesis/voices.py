"""What is heard before something is said: its units, and an embedding of who speaks.

By the models that `speak.speech_tokens` and `speak.speakers` name, which are those of a
preparation. Each is loaded once, where it is first needed.
"""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from raysft.config import listeners
from raysft.config.listeners import SPEAKERS, TOKENS
from raysft.config.speaking import Speak
from raysft.data.clips.audio import Limits
from raysft.data.clips.audio import load as decode
from raysft.data.example import ASSISTANT, Audio, Example, Part, Units

_TOKENS_OF = "raysft.prepare.listener:Tokens"
_NOWHERE = Path("no-preparation")  # none that can be named here keeps anything


class _Embeds(Protocol):
    sample_rate: int

    def hear(self, clip: np.ndarray) -> np.ndarray: ...


class _Makes(Protocol):
    sample_rate: int

    def tokens(self, clip: np.ndarray) -> np.ndarray: ...


class Voices:
    """Units and embeddings of clips."""

    def __init__(self, settings: Speak, limits: Limits) -> None:
        self._settings, self._limits = settings, limits

    def heard(self, example: Example) -> Example:
        """Its clips as units, where speak.speech_tokens makes them; not what is to be spoken.
        Raises BadExample, UserError."""
        if self._settings.speech_tokens is None:
            return example

        def units(part: Part) -> Part:
            if not isinstance(part, Audio):
                return part
            made = self._makes.tokens(decode(part, self._makes.sample_rate, self._limits))
            return Units(tuple(int(one) for one in made))

        turns = tuple(
            turn if turn.role == ASSISTANT else replace(turn, content=(*map(units, turn.content),))
            for turn in example.turns
        )
        return replace(example, input=(*map(units, example.input),), turns=turns)

    def embedding(self, example: Example) -> tuple[float, ...]:
        """Of the first clip that it hears; () where it hears none, or speak.speakers is not
        set."""
        clip = next(iter(heard(example)), None)
        if clip is None or self._settings.speakers is None:
            return ()
        values = self._embeds.hear(decode(clip, self._embeds.sample_rate, self._limits))
        return tuple(values.astype(float).tolist())

    @cached_property
    def _makes(self) -> _Makes:
        settings = self._settings.speech_tokens
        assert settings is not None
        listener = listeners.opened(TOKENS, settings, "speak.speech_tokens", _NOWHERE)
        found: _Makes = pkgutil.resolve_name(_TOKENS_OF)(listener, settings)
        return found

    @cached_property
    def _embeds(self) -> _Embeds:
        settings = self._settings.speakers
        assert settings is not None
        return cast(_Embeds, listeners.opened(SPEAKERS, settings, "speak.speakers", _NOWHERE))


def heard(example: Example) -> list[Audio]:
    """The clips that are heard before anything is said."""
    turns = [part for turn in example.turns if turn.role != ASSISTANT for part in turn.content]
    return [part for part in (*example.input, *turns) if isinstance(part, Audio)]
