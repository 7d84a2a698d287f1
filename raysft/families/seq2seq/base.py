"""seq2seq: a clip in, its text out. What all models of the family share.

The encoder reads a clip; the decoder has a row a clip, of the prompt's tokens and the text's, which
all attend to it. What an example has in front of them (a position for each that the encoder
computes) counts in plan and metrics and is in no row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMixin

from raysft.data.example import MicroBatch
from raysft.families.seq2seq.clip_encode import FEATURES
from raysft.families.seq2seq.prompts import Saved
from raysft.models.base import Batch, Document, SpeechModel
from raysft.models.layout import pad
from raysft.models.watched import watching


class Seq2Seq(SpeechModel):
    """A model whose decoder attends to what its encoder has heard."""

    def __init__(
        self,
        net: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        mode: Literal["packed", "padded"],
        end_id: int,
        start_id: int,
        processor: Saved,
    ) -> None:
        """start_id, end_id: tokens that begin and end what is decoded. processor: of an export."""
        super().__init__(net, tokenizer, mode, [end_id])
        self.processor, self.start_id = processor, start_id

    @abstractmethod
    def heard(self, frames: np.ndarray) -> np.ndarray:
        """Positions that the encoder computes for clips of so many frames; both int64 [clips]."""

    def documents(self, mb: MicroBatch) -> list[Document]:
        """Sequences with their clips. Raises ValueError where one has not one clip."""
        documents = super().documents(mb)
        for name, document in zip(mb.ids, documents, strict=True):
            if len(document.arrays.get(FEATURES, [])) != 1:
                raise ValueError(f"{name}: has not one clip")
        return documents

    def _heard(self, documents: Sequence[Document]) -> list[int]:
        frames = [len(document.arrays[FEATURES][0]) for document in documents]
        return self.heard(np.array(frames, np.int64)).tolist()

    def rows(
        self, documents: list[Document], side: Literal["right", "left"]
    ) -> tuple[Batch, Sequence[int]]:
        """The decoder's rows. They need no mask: no token sees those behind it, and rows that are
        padded on the left (prompts) are of one length."""
        heard = self._heard(documents)
        cut = [
            Document(d.input_ids[n:], d.labels[n:], d.task, d.arrays)
            for d, n in zip(documents, heard, strict=True)
        ]
        batch, offsets = pad(cut, self.pad_id, side)
        begun = [offset - n for offset, n in zip(offsets, heard, strict=True)]
        return {"decoder_input_ids": batch["input_ids"]}, begun

    def decoded(self, document: Document) -> int:
        """Positions of the decoder."""
        return len(document.input_ids) - self._heard([document])[0]

    def counts(self, mb: MicroBatch) -> dict[str, float]:
        """As `SpeechModel.counts`, with squares of the decoder's rows."""
        clips = mb.arrays.get(FEATURES)
        frames = np.zeros(0, np.int64) if clips is None else clips.lengths.astype(np.int64)
        rows = mb.lengths[: len(frames)] - self.heard(frames)
        return super().counts(mb) | {"squares": float(np.square(rows, dtype=np.float64).sum())}

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
        answers = GenerationMixin.generate(
            self.net, **inputs, **watching(self._watch, self._choose), synced_gpus=synced_gpus
        )
        assert isinstance(answers, torch.Tensor)
        return answers

    def save_processor(self, folder: Path) -> None:
        """Write the processor: feature extractor and tokenizer."""
        self.processor.save_pretrained(folder)
