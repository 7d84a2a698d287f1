"""seq2seq: a clip in, its text out. Whisper of transformers, taken as it is.

Stands between config and step. The encoder reads every clip padded to its chunk, at one cost; the
decoder has a row a clip, of the prompt's tokens and the text's. What an example has in front of
them (a position for each that the encoder computes) counts in plan and metrics and is in no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import (
    AutoFeatureExtractor,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    WhisperFeatureExtractor,
    WhisperProcessor,
)
from transformers.generation import GenerationMixin

from raysft.config import schema
from raysft.data.clips.features import FrontEnd
from raysft.data.encode import net_class
from raysft.data.example import MicroBatch
from raysft.families.seq2seq.encode import FEATURES, Seq2SeqEncoder
from raysft.families.seq2seq.prompt import NO_TIMESTAMPS, TRANSCRIBE, TRANSLATE, Prompt
from raysft.models import loading
from raysft.models.base import IGNORED, Batch, Document, SpeechModel
from raysft.models.layout import pad, tokens_of


class Seq2Seq(SpeechModel):
    """Whisper: features go through its encoder, which every token of the row attends to."""

    def __init__(
        self,
        net: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        mode: Literal["packed", "padded"],
        encoder: Seq2SeqEncoder,
        extractor: SequenceFeatureExtractor,
    ) -> None:
        """extractor: what makes the encoder's features in transformers."""
        super().__init__(net, tokenizer, mode, [encoder.end_id])
        self.processor = WhisperProcessor(extractor, tokenizer)
        self.front_end: FrontEnd = encoder.front_end
        self.heard, self.frames_limit = encoder.heard, encoder.max_frames
        self.start_id = encoder.template.start_id

    def dummy_document(self) -> Document:
        """A silent clip, a start token and an end token."""
        ids = np.array([self.pad_id] * self.heard + [self.start_id, self.stop_ids[0]], np.int32)
        clip = np.zeros((1 + self.front_end.tail, self.front_end.mels), np.float32)
        return Document(ids, np.full(len(ids), IGNORED, np.int32), "none", {FEATURES: [clip]})

    def documents(self, mb: MicroBatch) -> list[Document]:
        """Sequences with their clips. Raises ValueError where one has not one clip."""
        documents = super().documents(mb)
        for name, document in zip(mb.ids, documents, strict=True):
            if len(document.arrays.get(FEATURES, [])) != 1:
                raise ValueError(f"{name}: has not one clip")
        return documents

    def rows(
        self, documents: list[Document], side: Literal["right", "left"]
    ) -> tuple[Batch, Sequence[int]]:
        """The decoder's rows. They need no mask: no token sees those behind it, and rows that are
        padded on the left (prompts) are of one length."""
        n = self.heard
        cut = [Document(d.input_ids[n:], d.labels[n:], d.task, d.arrays) for d in documents]
        batch, offsets = pad(cut, self.pad_id, side)
        return {"decoder_input_ids": batch["input_ids"]}, [offset - n for offset in offsets]

    def decoded(self, document: Document) -> int:
        """Positions of the decoder."""
        return len(document.input_ids) - self.heard

    def computed(self, batch: Batch) -> int:
        """Positions of encoder and decoder, padding among them."""
        rows = tokens_of(batch)
        return rows.numel() + len(rows) * self.heard

    def counts(self, mb: MicroBatch) -> dict[str, float]:
        """As `SpeechModel.counts`, with squares of the decoder's rows; and clips: how many the
        encoder reads."""
        squares = np.square(mb.lengths - self.heard, dtype=np.float64).sum()
        return super().counts(mb) | {"squares": float(squares), "clips": float(len(mb.ids))}

    def features(self, documents: list[Document]) -> Batch:
        """Clips padded to the one length the encoder takes, a row each."""
        clips = [document.arrays[FEATURES][0] for document in documents]
        padded = np.stack([self.front_end.pad(clip, self.frames_limit).T for clip in clips])
        return {"input_features": torch.from_numpy(padded)}

    def _greedy(self, own: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
        """With the tokens left out that the model never says: so transformers answers too."""
        found = super()._greedy(own, max_new_tokens)
        found.decoder_start_token_id = self.start_id
        for key in ("suppress_tokens", "begin_suppress_tokens"):
            setattr(found, key, getattr(own, key, None))
        return found

    def _answered(self, inputs: Batch, synced_gpus: bool) -> torch.Tensor:
        """By what transformers generates with for all models: Whisper's own would look for a prompt
        and cut clips that are longer than a chunk. peft's layers are in the net itself."""
        answers = GenerationMixin.generate(self.net, **inputs, synced_gpus=synced_gpus)
        assert isinstance(answers, torch.Tensor)
        return answers

    def save_processor(self, folder: Path) -> None:
        """Write the processor: feature extractor and tokenizer."""
        self.processor.save_pretrained(folder)


def make_model(
    model: schema.Model,
    data: schema.Data,
    encoder: Seq2SeqEncoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> Seq2Seq:
    """The model of `model`, with an embedding for every token of the encoder's tokenizer."""
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
    return Seq2Seq(net, tokenizer, data.mode, encoder, extractor)


def _tell_languages(net: PreTrainedModel, prompt: Prompt) -> None:
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
