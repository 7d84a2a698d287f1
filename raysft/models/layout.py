"""Documents laid out as a model's rows: packed into one, or padded to the longest.

Stands in `base.SpeechModel.collate`, which says what a batch holds. Packed rows may be of one
length each (`Static`): what compiles, and what gives memory out, then sees one shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn

IGNORED = -100  # the label of what is not learnt
CONTEXT = "context"
"""The array of a sequence, and of a batch, with a row of numbers for each supervised token (see
`losses.learns`): float32 [M, C], in a batch as the bits int32."""

Batch = dict[str, torch.Tensor]


@dataclass(slots=True)
class Document:
    """One sequence of a batch, with its arrays as `data.example.Sequence` has them."""

    input_ids: np.ndarray
    labels: np.ndarray
    task: str
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)


class Static:
    """Shapes of packed rows that stay the same from micro-batch to micro-batch.

    A row is filled up to `positions` by documents of which nothing is learnt, short ones: attention
    costs the square of a length. The ends of documents are a multiple of ENDS, the last repeated
    (of a document without positions nothing is computed): as many as there have ever been, and a
    quarter more where that is not enough, for a kernel may keep something for each. What is
    supervised is a multiple of SUPERVISED. A row that is longer all the same (an example may be 2%
    longer than it was measured) is a multiple of LONGER.
    """

    def __init__(self, budget: int) -> None:
        """budget: positions of a micro-batch."""
        self.positions = _up(budget, ROW)
        self._ends = ENDS

    def fill(self, used: int) -> list[int]:
        """Lengths of the documents behind `used` positions."""
        whole = self.positions if used <= self.positions else _up(used, LONGER)
        left = whole - used
        rest = [left % FILLING] if left % FILLING else []
        return [FILLING] * (left // FILLING) + rest

    def repeat(self, ends: np.ndarray) -> np.ndarray:
        """`ends`, the last of them as often as it takes."""
        while self._ends < len(ends):
            self._ends = _up(self._ends * 5 // 4, ENDS)
        return np.pad(ends, (0, self._ends - len(ends)), mode="edge")


ROW = 64  # products of half precision are slower where a length is no multiple of 8
LONGER = 256
FILLING = 128  # positions that a kernel of attention takes at a time
ENDS = 32
SUPERVISED = 256


def pack(
    documents: list[Document], static: Static | None = None, pad_id: int = 0
) -> tuple[Batch, np.ndarray]:
    """One row of all documents, and where each begins in it. pad_id: what fills it up."""
    lengths = [len(d.input_ids) for d in documents]
    parts, used = [d.input_ids for d in documents], sum(lengths)
    if static is not None:
        filling = static.fill(used)
        parts.append(np.full(sum(filling), pad_id))
        lengths += filling
    ends = np.cumsum([0, *lengths])
    batch = {
        "input_ids": ints(np.concatenate(parts)).unsqueeze(0),
        "position_ids": ints(np.concatenate([np.arange(n) for n in lengths])).unsqueeze(0),
    }
    starts = ends[: len(documents)]
    if static is not None:
        batch["real"] = (torch.arange(int(ends[-1])) < used).long().unsqueeze(0)
        ends = static.repeat(ends)
    batch["documents"] = torch.from_numpy(ends.astype(np.int32))
    return batch, starts


def fill_supervised(batch: Batch) -> None:
    """Bring what is supervised in `batch` up to a multiple of SUPERVISED, by rows of task -1 that
    count for nothing."""
    for name, value in (("keep", 0), ("targets", 0), ("tasks", -1)):
        own = batch[name]
        more = own.new_full((_up(len(own), SUPERVISED) - len(own),), value)
        batch[name] = torch.cat([own, more])
    if (context := batch.get(CONTEXT)) is not None:
        more = context.new_zeros(len(batch["keep"]) - len(context), context.shape[1])
        batch[CONTEXT] = torch.cat([context, more])


def context_of(documents: list[Document]) -> Batch:
    """The context of what is supervised in `documents`, in their order; {} where none has one."""
    found = [array for d in documents for array in d.arrays.get(CONTEXT, ())]
    if not found:
        return {}
    return {CONTEXT: torch.from_numpy(np.concatenate(found)).view(torch.int32)}


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


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
