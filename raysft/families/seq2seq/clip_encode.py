"""Encoder of models that read a clip at its own length (`types`): Moonshine and others.

Stands in the data tasks. A clip becomes what the model's extractor makes of it alone, and as many
positions in front of the decoder's tokens as the encoder computes for it. The rows that the model
is given do not have these positions: see `clip_model`.

Costs what the extractor does for a clip of 2 s: 0.2 ms (moonshine), 3 ms (cohere_asr, canary and
speech_to_text, whose extractors import torch).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import numpy as np

from raysft.config.schema import Data, Model
from raysft.data import remote_code
from raysft.data.clips.features import load_extractor
from raysft.data.clips.stripes import Spectrogram
from raysft.data.encode.base import VERSION, Encoded, Encoder
from raysft.data.example import Audio, Units
from raysft.data.segments import Rendered
from raysft.data.text import load_tokenizer
from raysft.errors import BadExample, UserError
from raysft.families.seq2seq.prompt import Prompt
from raysft.families.seq2seq.prompts import TEMPLATE, Processor
from raysft.families.seq2seq.settings import generation_settings
from raysft.families.seq2seq.types import TYPES, ClipType, Config, Count, Extractor, through
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FEATURES = "features"  # the name of a clip's frames among the arrays of an example
COMMON = {"feature_size", "sampling_rate", "padding_value"}  # settings that every extractor has


class ClipEncoder(Encoder):
    """One clip in, its text out.

    kind: the model type. most: samples of a clip that are read at most; None: all.
    """

    sample_rate: int
    template: Prompt
    says_language = False

    def __init__(self, model: Model, data: Data, config: Config, kept: str | None = None) -> None:
        """config: of the model. kept: the prompt of a run that has begun. Raises UserError for
        models, tokenizers and feature settings that cannot be used."""
        kind: str = config.model_type
        self.kind, row = kind, TYPES[kind]
        extractor = _extractor(model, kind, row.settings(config))
        self._extractor: Extractor | bytes = extractor
        self.sample_rate = extractor.sampling_rate
        self.spectrogram = Spectrogram(FEATURES) if row.spectrogram else None
        tokenizer: PreTrainedTokenizerFast = resolve_name(row.tokenizer)(model)
        self._pad_id: int = tokenizer.pad_token_id
        self._framing, self._encoding = row.framing(extractor), row.encoder(config)
        self.most = row.most(config, extractor) if row.most else None
        generation = generation_settings(model)
        prompt = resolve_name(row.prompt)
        processor: Processor = self.processor(tokenizer)
        self.template = prompt(processor, kind, data.language, generation.get("language"), kept)
        start, own = self.template.start_id, config.decoder_start_token_id
        own = own if own is not None else generation.get("decoder_start_token_id")
        if model.path is not None and own not in (None, start):
            name = tokenizer.convert_ids_to_tokens(start)
            raise UserError(
                f"model.tokenizer: {name} has id {start} there, but its model begins with {own} "
                "(decoder_start_token_id): leave model.tokenizer out"
            )
        settings = [VERSION, "seq2seq", kind, self.template.fingerprint, extractor.to_dict()]
        settings += [self._framing, self._encoding]
        told = json.dumps(settings, sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    @property
    def row(self) -> ClipType:
        """Of its model type."""
        return TYPES[self.kind]

    @property
    def extractor(self) -> Extractor:
        """transformers' feature extractor."""
        if isinstance(self._extractor, bytes):
            self._extractor = remote_code.unpacked(self._extractor)
        return self._extractor  # type: ignore[return-value]  # no bytes any more

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> Processor:
        """transformers' processor, which an export has."""
        kind = resolve_name(self.row.processor)
        told = {}
        if "chat_template" in inspect.signature(kind.__init__).parameters:
            told["chat_template"] = tokenizer.chat_template or TEMPLATE
        return kind(feature_extractor=self.extractor, tokenizer=tokenizer, **told)

    def __getstate__(self) -> JsonObject:
        extractor = self._extractor
        if not isinstance(extractor, bytes):
            extractor = remote_code.packed(extractor, "AutoFeatureExtractor")
        return {**self.__dict__, "_extractor": extractor}

    def heard(self, frames: Count) -> Count:
        """Positions that the encoder computes for clips of so many frames."""
        return through(frames, self._encoding)

    def part_length(self, part: Audio | Units, samples: int, answer: bool) -> int:
        """Positions that the encoder computes. BadExample: too long or too short."""
        seconds = samples / self.sample_rate
        self._check_most(samples, self.most)
        found = self.heard(through(samples, self._framing))
        if found < 1:
            raise BadExample(
                f"its clip of {seconds:.3f} s is too short: the encoder makes no position of it",
                "too short",
            )
        return found

    def part_encoded(
        self, part: Audio | Units, clip: np.ndarray | None, rng: np.random.Generator | None
    ) -> Encoded:
        """A position for each that the encoder computes, and the clip's features: float32 [samples]
        or [frames, mels].

        Raises BadExample where the extractor makes more or fewer frames of it than planned.
        """
        assert clip is not None  # the prompt has one clip and no units
        made = self.extractor(clip, sampling_rate=self.sample_rate, return_tensors="np")
        (features,) = np.asarray(made[self.row.features], np.float32)
        if (mask := made.get("attention_mask")) is not None:
            features = features[: int(np.asarray(mask).sum())]
        planned = through(len(clip), self._framing)
        if len(features) != planned:
            raise BadExample(
                f"its clip of {len(clip)} samples becomes {len(features)} frames, {planned} were "
                "planned: transformers' extractor counts otherwise than this raysft",
                "longer than indexed",
            )
        if not np.isfinite(features).all():
            raise BadExample(
                "its clip has no features: the extractor divides by how much they vary, and here "
                "they do not (silence)",
                "silent",
            )
        ids = np.full(self.heard(planned), self._pad_id, np.int32)
        return Encoded(
            ids, len(clip) / self.sample_rate, {FEATURES: np.ascontiguousarray(features)}
        )

    def quiet(self, samples: int) -> Encoded:
        """What a clip of so many samples becomes in which there is next to nothing: of silence
        some extractors make no features."""
        noise = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
        return self.part_encoded(Audio("quiet"), 1e-3 * noise, None)

    def samples_of(self, positions: int) -> int:
        """About how many samples take so many positions, of what a clip may have."""
        second = self.heard(through(10 * self.sample_rate, self._framing)) / 10
        samples = int(positions / second * self.sample_rate)
        return max(self.fewest(), samples if self.most is None else min(samples, self.most))

    def fewest(self) -> int:
        """Samples of a short clip that gives some positions."""
        samples = self.sample_rate // 10
        while self.heard(through(samples, self._framing)) < 1:
            samples *= 2
        return samples

    def _limited(self, rendered: Rendered, found: int) -> int:
        """The decoder's: what is heard stands in none of its rows."""
        return sum(len(part) for part in rendered.segments if isinstance(part, np.ndarray))


def plain_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """That of the model's files. Raises UserError as `load_tokenizer`."""
    return load_tokenizer(model, 0)


def _extractor(model: Model, kind: str, own: JsonObject) -> Extractor:
    """transformers' feature extractor of the model. own: settings that follow from a config."""
    if model.path is not None:
        return load_extractor(model)
    made = resolve_name(TYPES[kind].extractor)
    known = {*inspect.signature(made.__init__).parameters, *COMMON} - {"self", "kwargs"}
    for key, value in model.feature_extractor.items():
        if key not in known:
            raise UserError(
                f"model.feature_extractor.{key}: no such setting: it takes "
                f"{', '.join(sorted(known))}"
            )
        if key in own and value != own[key]:
            raise UserError(
                f"model.feature_extractor.{key}: {value}, but a {kind} reads {own[key]}: leave it "
                "out"
            )
    return made(**{**model.feature_extractor, **own})
