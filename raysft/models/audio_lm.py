"""audio_lm: audio and text in, text out. Qwen2-Audio of transformers, taken as it is.

Stands between config and step. Every clip is padded to the encoder's fixed length, so its cost is
that of `2 * max_source_positions` frames whatever its own length; the text side pays for the
tokens there are. See `base` for what a batch holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import (
    AutoFeatureExtractor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from raysft.config import schema
from raysft.data.encode.audio_lm import AudioLMEncoder, audio_tokens
from raysft.data.example import MicroBatch
from raysft.errors import UserError
from raysft.models import loading
from raysft.models.base import IGNORED, Adapter, Batch, Document

# transformers starts the encoder's position table as noise and never trains it. Sinusoids say
# where a frame is; at full scale they drown the features of a small, untrained encoder.
POSITION_SCALE = 0.3
# Frames that give two audio tokens: two adjacent ones keep transformers off its old merging path.
DUMMY_FRAMES = 7


class AudioLM(Adapter):
    """Qwen2-Audio: features go through its encoder and take the place of the audio tokens."""

    def __init__(
        self,
        net: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        mode: Literal["packed", "padded"],
        stop_ids: Sequence[int],
        processor: Qwen2AudioProcessor,
        pad: Callable[[np.ndarray, int], np.ndarray],
    ) -> None:
        """pad: appends silence to a clip's features, up to a number of frames."""
        super().__init__(net, tokenizer, mode, stop_ids)
        self.processor = processor
        self.pad = pad
        self.audio_token_id: int = net.config.audio_token_id
        audio = net.config.audio_config
        self.mels: int = audio.num_mel_bins
        self.frames_limit: int = 2 * audio.max_source_positions

    def dummy_document(self) -> Document:
        """A silent clip of two audio tokens and an end token."""
        ids = np.array([self.audio_token_id] * 2 + [self.stop_ids[0]], np.int32)
        clip = np.zeros((DUMMY_FRAMES, self.mels), np.float32)
        return Document(ids, np.full(3, IGNORED, np.int32), "none", [clip])

    def documents(self, mb: MicroBatch) -> list[Document]:
        """Sequences with their clips; a clip belongs where its audio tokens are."""
        documents = super().documents(mb)
        clips = iter(np.split(mb.features, np.cumsum(mb.feature_lengths)[:-1]))
        for name, document in zip(mb.ids, documents, strict=True):
            wanted = int((document.input_ids == self.audio_token_id).sum())
            while wanted > 0:
                clip = next(clips, None)
                if clip is None:
                    raise ValueError(f"{name}: {wanted} audio tokens have no features")
                document.clips.append(clip)
                wanted -= audio_tokens(len(clip))
            if wanted < 0:
                raise ValueError(f"{name}: its clips give {-wanted} more audio tokens than it has")
        return documents

    def touches_everything(self, documents: list[Document]) -> bool:
        """Whether the encoder runs, by transformers' present path (two adjacent audio tokens)."""
        return any(audio_tokens(len(clip)) > 1 for d in documents for clip in d.clips)

    def features(self, documents: list[Document]) -> Batch:
        """Clips padded to the one length the encoder takes, and where they are real."""
        clips = [clip for document in documents for clip in document.clips]
        # Not zeros: the encoder's convolutions look across a clip's end, into the silence that
        # the model's own processor has there.
        padded = np.stack([self.pad(clip, self.frames_limit).T for clip in clips])
        lengths = np.array([[len(clip)] for clip in clips])
        mask = np.arange(self.frames_limit) < lengths
        return {
            "input_features": torch.from_numpy(padded),
            "feature_attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }

    def save(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As `Adapter.save`, with the processor (feature extractor, tokenizer, template)."""
        super().save(folder, state_dict)
        self.processor.save_pretrained(folder)


def make_adapter(
    model: schema.Model, data: schema.Data, encoder: AudioLMEncoder, seed: int
) -> AudioLM:
    """The model of `model`, with an embedding for every token of the encoder's tokenizer."""
    tokenizer, audio_token = encoder.tokenizer, encoder.audio_token_id
    if model.config is None:
        net = loading.from_path(model, Qwen2AudioForConditionalGeneration)
        loading.grow_vocabulary(net, len(tokenizer), seed)
    else:
        settings = dict(model.config)
        text = settings.get("text_config") or {}
        settings["text_config"] = loading.fill_from_tokenizer(text, tokenizer)
        settings.setdefault("audio_token_index", audio_token)
        net = loading.from_config(settings, Qwen2AudioForConditionalGeneration, seed)
        table = net.model.audio_tower.embed_positions.weight
        table.data.copy_(POSITION_SCALE * sinusoids(*table.shape))
    if net.config.audio_token_id != audio_token:
        raise UserError(
            f"model: its audio token is {net.config.audio_token_id}, the tokenizer's is "
            f"{audio_token}; give the tokenizer that belongs to the model"
        )
    if model.config is None:
        extractor = AutoFeatureExtractor.from_pretrained(model.path)
    else:
        extractor = WhisperFeatureExtractor(**encoder.feature_settings)
    processor = Qwen2AudioProcessor(extractor, tokenizer, chat_template=tokenizer.chat_template)
    stops = [encoder.end_id]
    return AudioLM(net, tokenizer, data.mode, stops, processor, encoder.front_end.pad)


def sinusoids(length: int, channels: int) -> torch.Tensor:
    """Whisper's fixed positions [length, channels]: sines, then cosines, of geometric periods."""
    half = channels // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    angles = torch.arange(length).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
