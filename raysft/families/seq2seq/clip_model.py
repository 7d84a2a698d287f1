"""Models that read a clip at its own length (`types`), trained as transformers has them.

Stands between config and step. A clip's encoding is what it is alone: the encoder is given clips of
one length at a time, and the decoder attends to each clip's own positions.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from raysft.config import schema
from raysft.data.encode import net_class
from raysft.families.seq2seq.base import Seq2Seq
from raysft.families.seq2seq.clip_encode import FEATURES, ClipEncoder
from raysft.models import decoders, loading, one_length
from raysft.models.base import IGNORED, Batch, Document
from raysft.models.layout import tokens_of

MASK = "attention_mask"  # of clips: 1 where there is a frame


class ClipModel(Seq2Seq):
    """A model of one of `types`."""

    def __init__(
        self, net: PreTrainedModel, mode: Literal["packed", "padded"], encoder: ClipEncoder
    ) -> None:
        tokenizer = encoder.tokenizer
        start, processor = encoder.template.start_id, encoder.processor(tokenizer)
        super().__init__(net, tokenizer, mode, encoder.end_id, start, processor)
        self.encoder = encoder
        self._smallest = self._quiet(encoder.fewest())

    def heard(self, frames: np.ndarray) -> np.ndarray:
        """As `Seq2Seq.heard`."""
        return self.encoder.heard(frames)

    def _quiet(self, samples: int) -> Document:
        """A quiet clip of so many samples, a start token and an end token; nothing is learnt."""
        quiet = self.encoder.quiet(samples)
        ids = np.append(quiet.ids, [self.start_id, self.stop_ids[0]]).astype(np.int32)
        arrays = {name: [array] for name, array in quiet.arrays.items()}
        return Document(ids, np.full(len(ids), IGNORED, np.int32), "none", arrays)

    def dummy_document(self) -> Document:
        """A short quiet clip, a start token and an end token."""
        return self._smallest

    def full_document(self, length: int) -> Document:
        """A quiet clip that fills about `length` positions, a start token and an end token."""
        return self._quiet(self.encoder.samples_of(length))

    def computed(self, batch: Batch) -> int:
        """Positions of encoder and decoder, padding of the decoder's rows among them."""
        frames = batch[MASK].sum(1).numpy()
        return tokens_of(batch).numel() + int(self.heard(frames).sum())

    def features(self, documents: list[Document]) -> Batch:
        """A row a clip, NaN behind its end (see `one_length`), and where it ends."""
        clips = [document.arrays[FEATURES][0] for document in documents]
        lengths = np.array([len(clip) for clip in clips])
        padded = np.full((len(clips), lengths.max(), *clips[0].shape[1:]), np.nan, np.float32)
        for row, clip in zip(padded, clips, strict=True):
            row[: len(clip)] = clip
        mask = np.arange(lengths.max()) < lengths[:, None]
        return {
            self.encoder.row.features: torch.from_numpy(padded),
            MASK: torch.from_numpy(mask.astype(np.int64)),
        }


def make_clip_model(
    model: schema.Model,
    data: schema.Data,
    encoder: ClipEncoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> ClipModel:
    """The model of `model`, with an embedding for every token of the encoder's tokenizer."""
    tokenizer, auto, part = encoder.tokenizer, net_class(model), encoder.row.text
    if model.config is None:
        net = loading.from_path(model, auto, quantization)
    else:
        settings = loading.fill_from_tokenizer(model.config, tokenizer)
        settings.setdefault("decoder_start_token_id", encoder.template.start_id)
        if part is not None:
            text = {"vocab_size": settings["vocab_size"], **(settings.get(part) or {})}
            settings[part] = loading.fill_from_tokenizer(text, tokenizer)
        net = loading.from_config(settings, auto, seed)
        net.generation_config.max_length = decoders.positions(net.config)
    loading.grow_vocabulary(net, len(tokenizer), seed)
    net.config.vocab_size = net.get_input_embeddings().weight.shape[0]
    net.generation_config.decoder_start_token_id = encoder.template.start_id
    one_length.attach(net.get_encoder())
    return ClipModel(net, data.mode, encoder)
