"""audio_lm: audio and text in, text out. Qwen2-Audio of transformers, taken as it is.

Stands between config and step. transformers pads every clip to `2 * max_source_positions` frames;
here the encoder pays for those that a clip has (`cut`). See `base` for what a batch holds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import (
    AutoFeatureExtractor,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2AudioProcessor,
    SequenceFeatureExtractor,
    Speech2TextFeatureExtractor,
    WhisperFeatureExtractor,
)

from raysft.config import schema
from raysft.data.clips.features import Fbank, FrontEnd
from raysft.data.encode import net_class
from raysft.data.example import MicroBatch
from raysft.errors import UserError
from raysft.families.audio_lm import cut, processor_model
from raysft.families.audio_lm.costs import QWEN2
from raysft.families.audio_lm.encode import FEATURES, AudioLMEncoder, audio_tokens
from raysft.families.audio_lm.processor_encode import ProcessorEncoder
from raysft.models import loading
from raysft.models.base import IGNORED, Batch, Document, SpeechModel

log = logging.getLogger(__name__)

# transformers starts the encoder's position table as noise and never trains it. Sinusoids say
# where a frame is; at full scale they drown the features of a small, untrained encoder.
POSITION_SCALE = 0.3
DUMMY_TOKENS = 2  # two adjacent ones keep transformers off its old merging path


class AudioLM(SpeechModel):
    """Qwen2-Audio: features go through its encoder and take the place of the audio tokens."""

    def __init__(
        self,
        net: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        mode: Literal["packed", "padded"],
        stop_ids: Sequence[int],
        preprocessor: Qwen2AudioProcessor | SequenceFeatureExtractor,
        front_end: FrontEnd,
    ) -> None:
        """front_end: made the clips' features; pads them with its silence.

        preprocessor: what makes the same features in transformers.
        """
        super().__init__(net, tokenizer, mode, stop_ids)
        self.preprocessor = preprocessor
        self.front_end = front_end
        self.audio_token_id: int = net.config.audio_token_id
        self.placeholders = [self.audio_token_id]
        audio = net.config.audio_config
        self.mels: int = audio.num_mel_bins
        self.frames_limit: int = 2 * audio.max_source_positions

    def dummy_document(self) -> Document:
        """A silent clip of two audio tokens and an end token."""
        return self._silent(DUMMY_TOKENS)

    def full_document(self, length: int) -> Document:
        """A silent clip that fills about `length` positions, and an end token."""
        most = audio_tokens(self.frames_limit)
        return self._silent(max(DUMMY_TOKENS, min(length - 1, most)))

    def _silent(self, tokens: int) -> Document:
        """A silent clip of so many audio tokens, of the fewest frames that make them."""
        ids = np.array([self.audio_token_id] * tokens + [self.stop_ids[0]], np.int32)
        clip = np.zeros((4 * tokens - 1 + self.front_end.tail, self.mels), np.float32)
        return Document(ids, np.full(len(ids), IGNORED, np.int32), "none", {FEATURES: [clip]})

    def documents(self, mb: MicroBatch) -> list[Document]:
        """Sequences with their clips. Raises ValueError where a sequence has not one audio token
        for each position that its clips take."""
        documents = super().documents(mb)
        for name, document in zip(mb.ids, documents, strict=True):
            wanted = int((document.input_ids == self.audio_token_id).sum())
            wanted -= sum(audio_tokens(self.frames(clip)) for clip in clips_of(document))
            if wanted > 0:
                raise ValueError(f"{name}: {wanted} audio tokens have no features")
            if wanted < 0:
                raise ValueError(f"{name}: its clips give {-wanted} more audio tokens than it has")
        return documents

    def counts(self, mb: MicroBatch) -> dict[str, float]:
        """As `SpeechModel.counts`, and frames that the encoder reads, and what they attend to
        (`EncoderCost.attended`)."""
        clips, frames = mb.arrays.get(FEATURES), np.zeros(0, np.int64)
        if clips is not None:
            frames = clips.lengths.astype(np.int64) - self.front_end.tail
        return super().counts(mb) | QWEN2.counts(self.net.config, frames)

    def touches_everything(self, documents: list[Document]) -> bool:
        """Whether the encoder runs, by transformers' present path (two adjacent audio tokens)."""
        return any(audio_tokens(self.frames(c)) > 1 for d in documents for c in clips_of(d))

    def frames(self, clip: np.ndarray) -> int:
        """Frames of a clip's features [frames + tail, mels] that the clip itself fills."""
        return len(clip) - self.front_end.tail

    def features(self, documents: list[Document]) -> Batch:
        """Clips padded to the longest of them, and where they are real."""
        clips = [clip for document in documents for clip in clips_of(document)]
        # Not zeros: the encoder's convolutions look across a clip's end, at what the model's own
        # processor has there: frames that still hear the clip, then silence.
        lengths = np.array([[self.frames(clip)] for clip in clips])
        most = cut.frames_of(int(lengths.max()), self.frames_limit)
        padded = np.stack([self.front_end.pad(clip, most).T for clip in clips])
        mask = np.arange(most) < lengths
        return {
            "input_features": torch.from_numpy(padded),
            "feature_attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }

    def save(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As `SpeechModel.save`, with the processor (feature extractor, tokenizer, template).

        Qwen2AudioProcessor works with Whisper's log-mel only. Beside other features goes their
        extractor alone, with a warning.
        """
        super().save(folder, state_dict)
        if not isinstance(self.preprocessor, Qwen2AudioProcessor):
            log.warning(
                "no processor is exported, for Qwen2AudioProcessor computes Whisper's log-mel, and "
                "this model reads other features: take AutoTokenizer, and AutoFeatureExtractor "
                "with padding='max_length', max_length=%d; the model takes its input_features "
                "transposed to [clips, mels, frames]",
                self.frames_limit,
            )

    def save_processor(self, folder: Path) -> None:
        """As `SpeechModel.save_processor`, with the feature extractor."""
        super().save_processor(folder)
        self.preprocessor.save_pretrained(folder)


def clips_of(document: Document) -> list[np.ndarray]:
    """Features [frames + tail, mels] of each of its clips."""
    return document.arrays.get(FEATURES, [])


def make_model(
    model: schema.Model,
    data: schema.Data,
    encoder: AudioLMEncoder | ProcessorEncoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> SpeechModel:
    """The model of `model`, with an embedding for every token of the encoder's tokenizer."""
    if isinstance(encoder, ProcessorEncoder):
        return processor_model.make_model(model, data, encoder, seed, quantization)
    tokenizer, audio_token = encoder.tokenizer, encoder.audio_token_id
    auto = net_class(model)
    if model.config is None:
        net = loading.from_path(model, auto, quantization)
        loading.grow_vocabulary(net, len(tokenizer), seed)
    else:
        settings = dict(model.config)
        text = settings.get("text_config") or {}
        settings["text_config"] = loading.fill_from_tokenizer(text, tokenizer)
        settings.setdefault("audio_token_index", audio_token)
        net = loading.from_config(settings, auto, seed)
        table = net.model.audio_tower.embed_positions.weight
        table.data.copy_(POSITION_SCALE * sinusoids(*table.shape))
    if net.config.audio_token_id != audio_token:
        raise UserError(
            f"model: its audio token is {net.config.audio_token_id}, the tokenizer's is "
            f"{audio_token}; give the tokenizer that belongs to the model"
        )
    cut.attach(net.model.audio_tower)
    preprocessor = _preprocessor(model, encoder)
    stops = [encoder.end_id]
    return AudioLM(net, tokenizer, data.mode, stops, preprocessor, encoder.front_end)


def _preprocessor(
    model: schema.Model, encoder: AudioLMEncoder
) -> Qwen2AudioProcessor | SequenceFeatureExtractor:
    """transformers' equal of the encoder's front end, in a processor where there is one for it."""
    front_end, tokenizer = encoder.front_end, encoder.tokenizer
    if isinstance(front_end, Fbank):
        # The same Kaldi features; of its normalisations, that of the mean alone.
        return Speech2TextFeatureExtractor(
            feature_size=front_end.mels,
            num_mel_bins=front_end.mels,
            sampling_rate=front_end.sample_rate,
            normalize_vars=False,
        )
    if model.config is None:
        extractor = AutoFeatureExtractor.from_pretrained(model.path, **model.hub)
    else:
        extractor = WhisperFeatureExtractor(**encoder.feature_settings)
    if not isinstance(extractor, WhisperFeatureExtractor):
        return extractor
    return Qwen2AudioProcessor(extractor, tokenizer, chat_template=tokenizer.chat_template)


def sinusoids(length: int, channels: int) -> torch.Tensor:
    """Whisper's fixed positions [length, channels]: sines, then cosines, of geometric periods."""
    half = channels // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    angles = torch.arange(length).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
