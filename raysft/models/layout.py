"""Documents laid out as a model's rows: packed into one, or padded to the longest.

Stands in `base.SpeechModel.collate`, which says what a batch holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn

IGNORED = -100  # the label of what is not learnt

Batch = dict[str, torch.Tensor]


@dataclass(slots=True)
class Document:
    """One sequence of a batch, with its arrays as `data.example.Sequence` has them."""

    input_ids: np.ndarray
    labels: np.ndarray
    task: str
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)


def pack(documents: list[Document]) -> tuple[Batch, np.ndarray]:
    """One row of all documents, and where each begins in it."""
    lengths = [len(d.input_ids) for d in documents]
    ends = np.cumsum([0, *lengths])
    batch = {
        "input_ids": ints(np.concatenate([d.input_ids for d in documents])).unsqueeze(0),
        "position_ids": ints(np.concatenate([np.arange(n) for n in lengths])).unsqueeze(0),
        "documents": torch.from_numpy(ends.astype(np.int32)),
    }
    return batch, ends[:-1]


def pad(
    documents: list[Document], pad_id: int, side: Literal["right", "left"]
) -> tuple[Batch, list[int]]:
    """A row a document, and the flat position where each begins."""
    longest = max(len(d.input_ids) for d in documents)
    shape = (len(documents), longest)
    ids, positions, mask = np.full(shape, pad_id), np.zeros(shape, int), np.zeros(shape, int)
    offsets = []
    for row, document in enumerate(documents):
        n = len(document.input_ids)
        start = longest - n if side == "left" else 0
        ids[row, start : start + n] = document.input_ids
        positions[row, start : start + n] = np.arange(n)
        mask[row, start : start + n] = 1
        offsets.append(row * longest + start)
    arrays = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    return {name: ints(array) for name, array in arrays.items()}, offsets


def as_weights(batch: Batch, net: nn.Module) -> Batch:
    """`batch` with its floats in the precision of the weights of `net`, where no autocast sees to
    that: under DeepSpeed, which itself casts what an engine is called with, and to fp16 alone."""
    if torch.is_autocast_enabled(tokens_of(batch).device.type):
        return batch
    precision = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    return {k: v.to(precision) if v.is_floating_point() else v for k, v in batch.items()}


def tokens_of(batch: Batch) -> torch.Tensor:
    """The rows of tokens [R, L] that a model makes logits of."""
    return batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"]


def ints(values: np.ndarray) -> torch.Tensor:
    """int64, as embeddings take them."""
    return torch.from_numpy(values.astype(np.int64))
