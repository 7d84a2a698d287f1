"""Whisper of transformers, taken as it is, and which model of seq2seq is made how.

Stands between config and step. The encoder reads every clip padded to its chunk, at one cost.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from transformers import (
    AutoFeatureExtractor,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    WhisperFeatureExtractor,
    WhisperProcessor,
)

from raysft.config import schema
from raysft.data.clips.features import FrontEnd
from raysft.data.encode import net_class
from raysft.data.example import MicroBatch
from raysft.families.seq2seq.base import Seq2Seq
from raysft.families.seq2seq.clip_encode import FEATURES, ClipEncoder
from raysft.families.seq2seq.clip_model import make_clip_model
from raysft.families.seq2seq.encode import WhisperEncoder
from raysft.families.seq2seq.whisper_prompt import (
    NO_TIMESTAMPS,
    TRANSCRIBE,
    TRANSLATE,
    WhisperPrompt,
)
from raysft.models import loading
from raysft.models.base import IGNORED, Batch, Document
from raysft.models.layout import tokens_of


class Whisper(Seq2Seq):
    """Whisper: every clip is padded to its chunk and read at one cost."""

    def __init__(
        self,
        net: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        mode: Literal["packed", "padded"],
        encoder: WhisperEncoder,
        extractor: SequenceFeatureExtractor,
    ) -> None:
        """extractor: what makes the encoder's features in transformers."""
        start, processor = encoder.template.start_id, WhisperProcessor(extractor, tokenizer)
        super().__init__(net, tokenizer, mode, encoder.end_id, start, processor)
        self.front_end: FrontEnd = encoder.front_end
        self.chunk, self.frames_limit = encoder.heard, encoder.max_frames

    def heard(self, frames: np.ndarray) -> np.ndarray:
        """Those of the chunk, for every clip."""
        return np.full(len(frames), self.chunk, np.int64)

    def dummy_document(self) -> Document:
        """A silent clip, a start token and an end token."""
        ids = np.array([self.pad_id] * self.chunk + [self.start_id, self.stop_ids[0]], np.int32)
        clip = np.zeros((1 + self.front_end.tail, self.front_end.mels), np.float32)
        return Document(ids, np.full(len(ids), IGNORED, np.int32), "none", {FEATURES: [clip]})

    def computed(self, batch: Batch) -> int:
        """Positions of encoder and decoder, padding among them."""
        rows = tokens_of(batch)
        return rows.numel() + len(rows) * self.chunk

    def counts(self, mb: MicroBatch) -> dict[str, float]:
        """As `Seq2Seq.counts`, and clips: how many the encoder reads."""
        return super().counts(mb) | {"clips": float(len(mb.ids))}

    def features(self, documents: list[Document]) -> Batch:
        """Clips padded to the one length the encoder takes, a row each."""
        clips = [document.arrays[FEATURES][0] for document in documents]
        padded = np.stack([self.front_end.pad(clip, self.frames_limit).T for clip in clips])
        return {"input_features": torch.from_numpy(padded)}


def make_model(
    model: schema.Model,
    data: schema.Data,
    encoder: WhisperEncoder | ClipEncoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> Seq2Seq:
    """The model of `model`, with an embedding for every token of the encoder's tokenizer."""
    if isinstance(encoder, ClipEncoder):
        return make_clip_model(model, data, encoder, seed, quantization)
    tokenizer, auto = encoder.tokenizer, net_class(model)
    if model.config is None:
        net = loading.from_path(model, auto, quantization)
        loading.grow_vocabulary(net, len(tokenizer), seed)
        extractor = AutoFeatureExtractor.from_pretrained(model.path, **model.hub)
    else:
        settings = loading.fill_from_tokenizer(model.config, tokenizer)
        settings.setdefault("decoder_start_token_id", encoder.template.start_id)
        settings.setdefault("begin_suppress_tokens", None)  # else ids of OpenAI's vocabulary
        net = loading.from_config(settings, auto, seed)
        _tell_languages(net, encoder.template)
        extractor = WhisperFeatureExtractor(**encoder.feature_settings)
    # Sinusoids, which transformers' class freezes, and from_pretrained forgets to.
    net.model.encoder.embed_positions.requires_grad_(False)
    _seed_masks(net)
    return Whisper(net, tokenizer, data.mode, encoder, extractor)


def _tell_languages(net: PreTrainedModel, prompt: WhisperPrompt) -> None:
    """What `generate` of transformers looks for a prompt in: a model of random weights has none."""
    known = prompt.tokenizer.convert_tokens_to_ids
    own: dict[str, object] = {
        "_from_model_config": False,  # else from_pretrained would make it anew
        "is_multilingual": prompt.multilingual,
        "no_timestamps_token_id": known(NO_TIMESTAMPS),
        "return_timestamps": False,
        "max_length": net.config.max_target_positions,
    }
    if prompt.multilingual:
        own["lang_to_id"] = {f"<|{code}|>": known(f"<|{code}|>") for code in prompt.codes}
        own["task_to_id"] = {name.strip("<|>"): known(name) for name in (TRANSCRIBE, TRANSLATE)}
    for key, value in own.items():
        setattr(net.generation_config, key, value)


def _seed_masks(net: PreTrainedModel) -> None:
    """Draw SpecAugment's masks (`apply_spec_augment`) from the generator that the step seeds, and
    mask a copy: numpy's, which transformers draws from, would go on where another run stands
    elsewhere."""
    mask = net.model._mask_input_features

    def seeded(features: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        if not (net.config.apply_spec_augment and net.model.training):
            return features
        state = np.random.get_state()
        np.random.seed(int(torch.randint(2**32, ())))
        try:
            return mask(features.clone(), attention_mask)
        finally:
            np.random.set_state(state)

    net.model._mask_input_features = seeded
