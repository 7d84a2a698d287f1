"""Encoder of text models that read and write speech as units: any AutoModelForCausalLM.

Stands in the data tasks. Units of a source become the tokens of `model.unit_token`, such as
`<|unit0|>`; audio is turned into units by the speech tokenizer of data.speech_tokens, where one is
configured.

Costs 0.06 ms an example of text and units, and the speech tokenizer's 0.5 ms a clip of 2 s.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raysft.config.families import families
from raysft.config.schema import Data, Model
from raysft.data.clips.speech_tokens import SpeechTokenizer, load
from raysft.data.encode.base import VERSION, Encoded, Encoder
from raysft.data.example import Audio, Units
from raysft.data.text import Template, add_units, load_tokenizer, unit_ids, unit_pattern
from raysft.data.tokenizer import add_markers, new_to_model
from raysft.errors import BadExample, UserError

if TYPE_CHECKING:
    pass


def make_encoder(model: Model, data: Data, run_folder: Path, kept: str | None) -> CausalLMEncoder:
    """See `raysft.data.encode.Encode`."""
    fitted = None
    if data.speech_tokens is not None:
        fitted = load(data.speech_tokens, run_folder)
    return CausalLMEncoder(model, data, fitted, kept)


class CausalLMEncoder(Encoder):
    """Text, units, and (with a speech tokenizer) audio, as one row of token ids."""

    def __init__(
        self,
        model: Model,
        data: Data,
        speech_tokens: SpeechTokenizer | None,
        kept: str | None = None,
    ) -> None:
        """kept: the chat template of a run that has begun. Raises UserError where
        model.speech_units contradicts the speech tokenizer, or the template cannot be used."""
        added = model.speech_units
        if speech_tokens is not None:
            if added not in (0, speech_tokens.clusters):
                raise UserError(
                    f"model.speech_units: {added}, but data.speech_tokens has "
                    f"{speech_tokens.clusters} clusters: leave model.speech_units out"
                )
            added = speech_tokens.clusters
        tokenizer = load_tokenizer(model, 0)
        _, extra = add_markers(tokenizer, model.extra_tokens)
        new = [*extra, *add_units(tokenizer, added, model.unit_token)]
        around: list[int] = []
        if model.unit_markers is not None:
            around, more = add_markers(tokenizer, model.unit_markers)
            new += more
        self._around = np.array(around, np.int32)
        self._unit_ids = unit_ids(tokenizer, model.unit_token)
        used = [*tokenizer.convert_tokens_to_ids(model.extra_tokens), *self._unit_ids.tolist()]
        self.new_ids = new_to_model(model, tokenizer, [*used, *around], new)
        # Units of the base vocabulary are read as one token only where they are added tokens too.
        add_units(tokenizer, len(self._unit_ids), model.unit_token)
        units = tokenizer.convert_ids_to_tokens(self._unit_ids.tolist())
        self.units = _said(units, len(set(self.new_ids) & set(self._unit_ids.tolist())))
        hole = units[0] if units else None
        form = unit_pattern(model.unit_token) if units else None
        self.template = Template(tokenizer, data, hole=hole, units=form, kept=kept)
        tokenizer.chat_template = self.template.source
        self.speech_tokens = speech_tokens
        self.sample_rate = None if speech_tokens is None else speech_tokens.sample_rate
        self._noise = data.unit_noise
        parts = [VERSION, "causal_lm", self.template.fingerprint, self._unit_ids.tolist()]
        parts.append(None if speech_tokens is None else speech_tokens.fingerprint())
        if around:
            parts.append(around)
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def unit_tokens(self) -> tuple[int, ...]:
        """The id of each unit."""
        return tuple(self._unit_ids.tolist())

    def part_length(self, part: Audio | Units, samples: int, answer: bool) -> int:
        """A position a unit, and one a marker. BadExample: a unit without a token, a clip without
        a unit."""
        if isinstance(part, Units):
            self._check(part.ids)
            return len(part.ids) + len(self._around)
        if self.speech_tokens is None:
            hearing = next(row for row in families() if row.hears)
            raise UserError(
                f"model.family: causal_lm reads no raw audio ({part.path}): set "
                f"data.speech_tokens to turn it into units, or use a model that hears: "
                f"{next(iter(hearing.types))} (model.family: {hearing.name})"
            )
        units = self.speech_tokens.units_count(samples)
        if units == 0:
            seconds = samples / self.speech_tokens.sample_rate
            raise BadExample(
                f"its clip of {seconds:.3f} s is shorter than one speech unit", "too short"
            )
        return units + len(self._around)

    def part_encoded(
        self, part: Audio | Units, clip: np.ndarray | None, rng: np.random.Generator | None
    ) -> Encoded:
        """Unit tokens; with `rng`, a share data.unit_noise of them is drawn at random."""
        if isinstance(part, Audio):
            assert self.speech_tokens is not None and clip is not None  # its length was asked for
            units = self.speech_tokens.encode(clip)
        else:
            units = np.array(part.ids, np.int64)
        rate = None if self.speech_tokens is None else self.speech_tokens.units_per_second
        seconds = len(units) / rate if rate else 0.0
        if rng is not None and self._noise:
            replaced = rng.random(len(units)) < self._noise
            units = np.where(replaced, rng.integers(len(self._unit_ids), size=len(units)), units)
        ids = self._unit_ids[units].astype(np.int32)
        if len(self._around):
            ids = np.concatenate([self._around[:1], ids, self._around[1:]])
        return Encoded(ids, seconds)

    def _check(self, units: tuple[int, ...]) -> None:
        highest = max(units, default=0)
        if highest >= len(self._unit_ids) or min(units, default=0) < 0:
            wrong = highest if highest >= len(self._unit_ids) else min(units)
            raise BadExample(
                f"unit {wrong}, but there are {len(self._unit_ids)} units "
                "(model.speech_units, or data.speech_tokens.clusters)",
                "unknown unit",
            )


def _said(units: list[str], new: int) -> str:
    """Which unit tokens there are, for people."""
    if not units:
        return ""
    named = f"{units[0]} .. {units[-1]}" if len(units) > 1 else units[0]
    if not new:
        return f"{len(units)} unit tokens, all in the tokenizer already: {named}"
    if new == len(units):
        return f"{len(units)} unit tokens, all new: {named}"
    return f"{len(units)} unit tokens, {new} of them new: {named}"
