"""Encoder of a pair: an example is both what the language model learns and what the decoder does.

Stands in the data tasks. The language model's sequence comes first, then a position for each frame
of the mel, of which it sees nothing: so that a micro-batch has room for both. The language model
learns the speech tokens that the decoder makes sound of; they are the source's, or made of the clip
by data.speech_tokens. Costs what the two cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raysft.config.schema import Data, Model
from raysft.data.clips.audio import resample
from raysft.data.clips.file import resampled_length
from raysft.data.clips.speech_tokens import load
from raysft.data.encode.base import IGNORED, Encoded, Encoder
from raysft.data.example import Audio, Example, Part, Sequence, Units
from raysft.errors import BadExample, UserError, first_line
from raysft.families.causal_lm.encode import CausalLMEncoder
from raysft.families.flow_decoder.encode import FlowEncoder

if TYPE_CHECKING:
    from raysft.families.pair.config import PairConfig


def make_encoder(model: Model, data: Data, run_folder: Path, kept: str | None) -> PairEncoder:
    """See `raysft.data.encode.Encode`."""
    from raysft.families.flow_decoder.config import FlowDecoderConfig

    fitted = None
    if data.speech_tokens is not None:
        fitted = load(data.speech_tokens, run_folder)
    flow = config_of(model).flow_config
    assert isinstance(flow, FlowDecoderConfig)
    padded = data.model_copy(update={"mode": "padded"})  # the decoder's rows are, in either
    return PairEncoder(
        CausalLMEncoder(model, data, fitted, kept), FlowEncoder(padded, flow, fitted)
    )


def config_of(model: Model) -> PairConfig:
    """The config of the model. Raises UserError naming what is wrong in it."""
    from raysft.families.flow_decoder.config import FlowDecoderConfig
    from raysft.families.pair.config import PairConfig

    known = set(FlowDecoderConfig.__dataclass_fields__) | {"model_type"}
    for key in sorted((model.config or {}).get("flow_config") or {}):
        if key not in known:
            raise UserError(f"model.config.flow_config.{key}: unknown key for a flow decoder")
    try:
        if model.config is None:
            return PairConfig.from_pretrained(model.path, **model.hub)
        return PairConfig(**{k: v for k, v in model.config.items() if k != "model_type"})
    except (OSError, ValueError, TypeError, KeyError) as error:
        where = "model.config" if model.config is not None else f"model.path {model.path}"
        raise UserError(f"{where}: {first_line(error)}") from None


class PairEncoder(Encoder):
    """Text and speech tokens in; tokens, and a mel, out."""

    sample_rate: int
    says_language = False

    def __init__(self, llm: CausalLMEncoder, flow: FlowEncoder) -> None:
        """Of the two models."""
        self.llm, self.flow = llm, flow
        self.speaker = flow
        self.sample_rate = flow.sample_rate
        self.template, self.new_ids, self.units = llm.template, llm.new_ids, llm.units
        told = f"pair {llm.fingerprint} {flow.fingerprint}"
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def limit(self, positions: int | None) -> None:
        """Of the language model's sequences."""
        self.llm.limit(positions)
        super().limit(positions)

    def part_length(self, part: Audio | Units, samples: int, answer: bool) -> int:
        """Parts are not measured alone: see `measure`."""
        raise NotImplementedError("a pair reads examples, not their parts")

    def part_encoded(
        self, part: Audio | Units, clip: np.ndarray | None, rng: np.random.Generator | None
    ) -> Encoded:
        """Parts are not encoded alone: see `encode`."""
        raise NotImplementedError("a pair reads examples, not their parts")

    def measure(self, example: Example, samples: Items[int]) -> int:
        """Positions of the language model's sequence, and frames. Raises BadExample where either
        cannot use it."""
        text = self.llm.measure(self._written(example), self._heard_lengths(samples))
        return text + self.flow.measure(example, samples)

    def encode(
        self,
        example: Example,
        clips: Items[np.ndarray],
        rng: np.random.Generator | None = None,
        promised: int | None = None,
    ) -> Sequence:
        """As `Encoder.encode`: the tokens, then a position that is not learnt for each frame."""
        written = self._written(example)
        text = self.llm.encode(written, self._heard(written, clips), rng)
        sound = self.flow.encode(example, clips, rng)
        frames = len(sound.input_ids)
        found = replace(
            text,
            input_ids=np.concatenate([text.input_ids, np.zeros(frames, np.int32)]),
            labels=np.concatenate([text.labels, np.full(frames, IGNORED, np.int32)]),
            arrays={**text.arrays, **sound.arrays},
            seconds=sound.seconds,
        )
        self._check_promised(len(found.input_ids), promised)
        return found

    def prompt(self, example: Example, clips: Items[np.ndarray]) -> Sequence:
        """What the language model is asked."""
        written = example if example.script else self._written(example)
        return self.llm.prompt(written, self._heard(written, clips))

    def _written(self, example: Example) -> Example:
        """As the language model reads it: without its clip, where its tokens are there."""
        if example.turns or example.document or example.tokens is not None:
            raise BadExample(
                "a pair learns what is spoken of one text, no conversation or document",
                "not one clip",
            )
        if not any(isinstance(part, Units) for part in example.parts):
            return example

        def without(parts: tuple[Part, ...]) -> tuple[Part, ...]:
            return tuple(part for part in parts if not isinstance(part, Audio))

        return replace(example, input=without(example.input), output=without(example.output))

    def _heard(self, written: Example, clips: Items[np.ndarray]) -> list[np.ndarray]:
        rate = self.llm.sample_rate
        if rate is None or not written.audio():
            return []
        return [resample(clip, self.sample_rate, rate) for clip in clips]

    def _heard_lengths(self, samples: Items[int]) -> list[int]:
        rate = self.llm.sample_rate
        if rate is None:
            return []
        return [resampled_length(count, self.sample_rate, rate) for count in samples]
