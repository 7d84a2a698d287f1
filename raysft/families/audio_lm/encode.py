"""Encoder of models that hear audio and answer in text: Qwen2-Audio.

Stands in the data tasks. A clip becomes `<|AUDIO|>` n times, where the template has one, and its
frames; the model puts its n audio embeddings in place of the n `<|AUDIO|>`. The template is that of
the model's processor.

Costs 0.06 ms for the text and 0.45 ms a clip of 2 s for its log-mel.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raysft.config.schema import Data, Model
from raysft.data.clips.features import Fbank, FrontEnd, LogMel, ModelExtractor, load_extractor
from raysft.data.clips.stripes import Spectrogram
from raysft.data.encode.base import VERSION, Encoded, Encoder
from raysft.data.encode.families import model_family, model_type
from raysft.data.example import Audio, Units
from raysft.data.text import Template, load_tokenizer
from raysft.errors import BadExample, UserError, first_line
from raysft.families.audio_lm.processor_encode import ProcessorEncoder
from raysft.families.audio_lm.types import TYPES, refuse_part
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

FEATURES = "features"  # the name of a clip's frames among the arrays of an example
FRAMES_PER_POSITION = 2  # the encoder's second convolution has stride 2
FEWEST_TOKENS = 2  # with fewer adjacent audio tokens Qwen2-Audio takes its old path, which fails


def make_encoder(model: Model, data: Data, run_folder: Path, kept: str | None) -> Encoder:
    """See `raysft.data.encode.Encode`. Of the run's folder nothing is needed."""
    kind = model_type(model)
    if kind in TYPES:
        return ProcessorEncoder(model, data, kind, TYPES[kind], kept)
    return AudioLMEncoder(model, data, kept)


class AudioLMEncoder(Encoder):
    """Text and audio in, text out.

    feature_settings: arguments of the WhisperFeatureExtractor to export with a model that was
    made from a config. max_frames: what the model reads at most.
    """

    sample_rate: int

    def __init__(self, model: Model, data: Data, kept: str | None = None) -> None:
        """kept: the chat template of a run that has begun. Raises UserError for models, templates
        and feature settings that cannot be used."""
        config = _model_config(model)
        audio = config.audio_config
        self.max_frames = FRAMES_PER_POSITION * audio.max_source_positions
        self.front_end, self.feature_settings = _front_end(
            model, data, audio.num_mel_bins, self.max_frames
        )
        if self.front_end.mels != audio.num_mel_bins:
            raise UserError(
                f"model.feature_extractor.feature_size: {self.front_end.mels}, but the model reads "
                f"{audio.num_mel_bins} mels (audio_config.num_mel_bins)"
            )
        self.sample_rate = self.front_end.sample_rate
        self.spectrogram = Spectrogram(FEATURES, tail=self.front_end.tail)
        tokenizer = load_tokenizer(model, 0)
        names = [
            getattr(tokenizer, "audio_bos_token", None) or "<|audio_bos|>",
            getattr(tokenizer, "audio_token", None) or "<|AUDIO|>",
            getattr(tokenizer, "audio_eos_token", None) or "<|audio_eos|>",
        ]
        tokenizer.add_tokens(names, special_tokens=True)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(names[1])
        if model.path is not None and config.audio_token_id != self.audio_token_id:
            raise UserError(
                f"model.tokenizer: {names[1]} has id {self.audio_token_id} there, but its model "
                f"expects {config.audio_token_id} (audio_token_index): leave model.tokenizer out"
            )
        own = None if kept or data.template == "plain" else _own_template(model, tokenizer)
        markup = "".join(names)
        self.template = Template(
            tokenizer, data, names, hole=names[1], markup=markup, own=own, kept=kept
        )
        tokenizer.chat_template = self.template.source
        settings: list[object] = [VERSION, "audio_lm", self.template.fingerprint, self.max_frames]
        settings += [repr(self.front_end), data.features, names]
        self.fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def part_length(self, part: Audio | Units, samples: int, answer: bool) -> int:
        """Audio tokens of the clip. BadExample: too long or too short."""
        refuse_part(part, answer)
        frames = self.front_end.frames(samples)
        tokens = audio_tokens(frames)
        seconds = samples / self.sample_rate
        if frames > self.max_frames:
            most = self.max_frames * 10 / self.front_end.frames(10 * self.sample_rate)
            raise BadExample(
                f"its clip is {seconds:.2f} s, the model reads at most {most:.2f} s", "too long"
            )
        if tokens < FEWEST_TOKENS:
            raise BadExample(
                f"its clip of {seconds:.3f} s is too short: {tokens} audio token", "too short"
            )
        return tokens

    def part_encoded(
        self, part: Audio | Units, clip: np.ndarray | None, rng: np.random.Generator | None
    ) -> Encoded:
        """The audio tokens, and the clip's frames: float32 [frames + front_end.tail, mels]."""
        assert clip is not None  # units were refused
        features = self.front_end(clip)
        count = audio_tokens(self.front_end.frames(len(clip)))
        ids = np.full(count, self.audio_token_id, np.int32)
        return Encoded(ids, len(clip) / self.sample_rate, {FEATURES: features})


def audio_tokens(frames: int) -> int:
    """Embeddings Qwen2-Audio makes of so many mel frames: a convolution and a pooling of stride 2.

    `_get_feat_extract_output_lengths` of transformers' modeling_qwen2_audio.
    """
    return (((frames - 1) // 2 + 1) - 2) // 2 + 1


def _own_template(model: Model, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The chat template that the model's processor has; None: that of the tokenizer, if any.

    A processor without one takes a template of transformers' own. It is the model's where the
    tokenizer has its markers, as that of Qwen2-Audio does.
    """
    from transformers import Qwen2AudioProcessor

    if model.path is None or model.tokenizer not in (None, model.path):
        return None
    try:
        found, _ = Qwen2AudioProcessor.get_processor_dict(model.path, **model.hub)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: its processor cannot be read: {first_line(error)}") from None
    template = found.get("chat_template")
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None:
        return template
    known = tokenizer.get_vocab()
    if all(marker in known for marker in ("<|im_start|>", "<|im_end|>")):
        return Qwen2AudioProcessor.default_chat_template.fget(None)
    return None


def _model_config(model: Model) -> PreTrainedConfig:
    """The transformers config of a model of this family."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if model.path is not None:
        try:
            config = AutoConfig.from_pretrained(model.path, **model.hub)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.path: no model at {model.path!r}: {first_line(error)}"
            ) from None
    else:
        settings = dict(model.config or {})
        try:
            config = AutoConfig.for_model(settings.pop("model_type", ""), **settings)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise UserError(f"model.config: {error}") from None
    model_family(model).check_type(config.model_type)
    return config


def _front_end(model: Model, data: Data, mels: int, max_frames: int) -> tuple[FrontEnd, JsonObject]:
    """The front end, and the settings of a WhisperFeatureExtractor for export."""
    from transformers import WhisperFeatureExtractor

    if model.path is not None:
        extractor = load_extractor(model)
    else:
        known = {"feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft"}
        for key in model.feature_extractor:
            if key not in known:
                raise UserError(
                    f"model.feature_extractor.{key}: no such setting: it takes "
                    f"{', '.join(sorted(known))}"
                )
        extractor = WhisperFeatureExtractor(**{"feature_size": mels, **model.feature_extractor})
        if extractor.nb_max_frames != max_frames:
            hops_per_second = extractor.sampling_rate / extractor.hop_length
            raise UserError(
                f"model.feature_extractor.chunk_length: {extractor.chunk_length} s are "
                f"{extractor.nb_max_frames} frames, but the model reads {max_frames} (twice "
                "audio_config.max_source_positions): set chunk_length to "
                f"{max_frames / hops_per_second:g}"
            )
    rate = extractor.sampling_rate
    settings = extractor.to_dict()
    if data.features == "fbank":
        return Fbank(rate, mels), settings
    if type(extractor) is WhisperFeatureExtractor and not extractor.dither:
        shape = (extractor.feature_size, extractor.n_fft, extractor.hop_length, extractor.n_samples)
        return LogMel(rate, *shape), settings
    return ModelExtractor(extractor, rate, extractor.feature_size), settings
