"""Encoders of speech models with an encoder and a decoder: that of Whisper, and who has which.

Stands in the data tasks. A clip becomes its frames, and as many positions in front of the decoder's
tokens as the encoder computes for it: always those of the whole chunk (1,500 for 30 s), whatever
the clip's own length. So the plan, the budget of a micro-batch and the metrics count what is
computed. The rows that the model is given do not have these positions: see `model`.

Costs 0.02 ms for the text and 0.45 ms a clip of 2 s for its log-mel.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raysft.config.schema import Data, Model
from raysft.data.clips.features import FrontEnd, LogMel, ModelExtractor, load_extractor
from raysft.data.clips.stripes import Spectrogram
from raysft.data.encode.base import VERSION, Encoded, Encoder
from raysft.data.example import Audio, Units
from raysft.data.text import load_tokenizer
from raysft.errors import BadExample, UserError
from raysft.families.seq2seq.clip_encode import FEATURES, ClipEncoder
from raysft.families.seq2seq.settings import generation_settings, model_config
from raysft.families.seq2seq.types import TYPES, Config
from raysft.families.seq2seq.whisper_prompt import START, WhisperPrompt
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

FRAMES_PER_POSITION = 2  # the encoder's second convolution has stride 2
ENGLISH_ONLY = 51864  # tokens of a Whisper that has no languages: see `_multilingual`
_SETTINGS = ("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft")


def make_encoder(
    model: Model, data: Data, run_folder: Path, kept: str | None
) -> WhisperEncoder | ClipEncoder:
    """See `raysft.data.encode.Encode`. Of the run's folder nothing is needed."""
    config = model_config(model)
    if config.model_type in TYPES:
        return ClipEncoder(model, data, config, kept)
    return WhisperEncoder(model, data, config, kept)


class WhisperEncoder(Encoder):
    """One clip in, its text out.

    heard: positions that the encoder computes for a clip. feature_settings: arguments of the
    WhisperFeatureExtractor to export with a model that was made from a config.
    """

    sample_rate: int
    template: WhisperPrompt
    says_language = False

    def __init__(self, model: Model, data: Data, config: Config, kept: str | None = None) -> None:
        """config: of the model. kept: the prompt of a run that has begun. Raises UserError for
        models, tokenizers and feature settings that cannot be used."""
        self.heard: int = config.max_source_positions
        self.max_frames = FRAMES_PER_POSITION * self.heard
        extractor = _extractor(model, config)
        self.feature_settings: JsonObject = extractor.to_dict()
        self.front_end = _front_end(extractor)
        self.sample_rate = self.front_end.sample_rate
        self.spectrogram = Spectrogram(FEATURES, tail=self.front_end.tail)
        tokenizer = load_tokenizer(model, 0)
        self._pad_id: int = tokenizer.pad_token_id
        generation = generation_settings(model)
        self.template = WhisperPrompt(
            tokenizer,
            _multilingual(model, config, generation, tokenizer.get_vocab()),
            data.language,
            generation.get("language"),
            kept,
        )
        start = self.template.start_id
        if model.path is not None and config.decoder_start_token_id != start:
            raise UserError(
                f"model.tokenizer: {START} has id {start} there, but its model begins with "
                f"{config.decoder_start_token_id} (decoder_start_token_id): leave model.tokenizer "
                "out"
            )
        settings = [VERSION, "seq2seq", self.template.fingerprint, self.heard, repr(self.front_end)]
        self.fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def limit(self, positions: int | None) -> None:
        """positions: the decoder's; an example has the encoder's besides."""
        super().limit(None if positions is None else self.heard + positions)

    def part_length(self, part: Audio | Units, samples: int, answer: bool) -> int:
        """Positions that the encoder computes. BadExample: too long."""
        frames = self.front_end.frames(samples)
        if frames > self.max_frames:
            seconds = samples / self.sample_rate
            most = self.max_frames * 10 / self.front_end.frames(10 * self.sample_rate)
            raise BadExample(
                f"its clip is {seconds:.2f} s, the model reads at most {most:.2f} s", "too long"
            )
        return self.heard

    def part_encoded(
        self, part: Audio | Units, clip: np.ndarray | None, rng: np.random.Generator | None
    ) -> Encoded:
        """A position for each that the encoder computes, and the clip's frames: float32
        [frames + front_end.tail, mels]."""
        assert clip is not None  # the prompt has one clip and no units
        ids = np.full(self.heard, self._pad_id, np.int32)
        return Encoded(ids, len(clip) / self.sample_rate, {FEATURES: self.front_end(clip)})


def _multilingual(
    model: Model, config: Config, generation: JsonObject, vocabulary: dict[str, int]
) -> bool:
    """Whether the model is told language and task.

    An English-only Whisper has the same tokens, but for one: OpenAI tells it by the size of its
    vocabulary, transformers by its generation config.
    """
    stated = generation.get("is_multilingual")
    if isinstance(stated, bool):
        return stated
    if model.path is not None and config.vocab_size == ENGLISH_ONLY:
        return False
    return "<|transcribe|>" in vocabulary


def _extractor(model: Model, config: Config) -> WhisperFeatureExtractor:
    """transformers' feature extractor of the model."""
    from transformers import WhisperFeatureExtractor

    if model.path is not None:
        return load_extractor(model)
    for key in model.feature_extractor:
        if key not in _SETTINGS:
            raise UserError(
                f"model.feature_extractor.{key}: no such setting: it takes {', '.join(_SETTINGS)}"
            )
    mels, frames = config.num_mel_bins, FRAMES_PER_POSITION * config.max_source_positions
    extractor = WhisperFeatureExtractor(**{"feature_size": mels, **model.feature_extractor})
    if extractor.feature_size != mels:
        raise UserError(
            f"model.feature_extractor.feature_size: {extractor.feature_size}, but the model reads "
            f"{mels} mels (num_mel_bins)"
        )
    if extractor.nb_max_frames != frames:
        seconds = frames * extractor.hop_length / extractor.sampling_rate
        raise UserError(
            f"model.feature_extractor.chunk_length: {extractor.chunk_length} s are "
            f"{extractor.nb_max_frames} frames, but the model reads {frames} (twice "
            f"max_source_positions): set chunk_length to {seconds:g}"
        )
    return extractor


def _front_end(extractor: WhisperFeatureExtractor) -> FrontEnd:
    """What computes the extractor's features in the data tasks."""
    from transformers import WhisperFeatureExtractor

    rate, mels = extractor.sampling_rate, extractor.feature_size
    if type(extractor) is WhisperFeatureExtractor and not extractor.dither:
        return LogMel(rate, mels, extractor.n_fft, extractor.hop_length, extractor.n_samples)
    return ModelExtractor(extractor, rate, mels)
