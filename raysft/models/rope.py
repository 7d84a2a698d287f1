"""Rotary positions whose frequencies depend on a length: that of each document, not of the batch.

Two kinds of scaling choose their frequencies in the forward pass. `longrope` (Phi-3, Phi-3.5,
Phi-4-mini) has one set up to the length the model was first trained on and one beyond;
`dynamic` (NTK) stretches them with the length beyond it. transformers looks at the longest row of
the batch, and for `dynamic` at the longest that the process has seen: losses then depend on batch
mates, on the number of workers, and on what came before a resume. Here each document has the
frequencies that transformers gives it when it is alone in a fresh process.

Stands inside the model: `attach` replaces the forward of its rotary modules. Costs one product of
positions and frequencies for each set in use, once a forward pass, not once a layer.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

KINDS = ("dynamic", "longrope")


def attach(net: PreTrainedModel) -> bool:
    """Make the rotary modules of `net` look at documents. Returns whether it has such modules."""
    found = False
    for module in net.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if any(kind and _kind(kind) in KINDS for kind in kinds):
            module.forward = MethodType(_by_document, module)
            found = True
    return found


def document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """int64 [R, L]: how long the document of each position is, as far as it reaches in its row.

    position_ids: [R, L], beginning anew at 0 with every document. A row that begins later (a step
    of generation) counts from its document's start.
    """
    starts = (position_ids == 0).long()
    starts[:, 0] = 1
    number = starts.flatten().cumsum(0) - 1
    longest = torch.zeros_like(number).scatter_reduce(
        0, number, position_ids.flatten().long(), "amax"
    )
    return (longest[number] + 1).view_as(position_ids)


def _kind(rope_type: str) -> str:
    return "dynamic" if "dynamic" in rope_type else rope_type


def _by_document(
    module: Any, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
) -> object:
    """transformers' forward of a rotary module, once for each set of frequencies in use."""
    rest = {} if layer_type is None else {"layer_type": layer_type}
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if _kind(kind) not in KINDS or position_ids.ndim != 2:
        return type(module).forward(module, x, position_ids, **rest)
    lengths, first = document_lengths(position_ids), 0
    if kind == "longrope":
        settings = module.config.rope_parameters
        first = (settings if layer_type is None else settings[layer_type])[
            "original_max_position_embeddings"
        ]
        lengths = lengths.clamp(first, first + 1)  # there are two sets only
    else:
        lengths = lengths.clamp(module.original_max_seq_len)
    joined = None
    for length in lengths.unique().tolist():
        _forget(module, layer_type)
        # transformers goes by the largest position there is. Where it is past the limit of
        # `longrope`, how far does not matter.
        whole = kind == "longrope" and length > first
        at = position_ids if whole else position_ids.clamp(max=length - 1)
        found = type(module).forward(module, x, at, **rest)
        if joined is None:
            joined = found
        elif isinstance(found, tuple):
            chosen = (lengths == length).unsqueeze(-1)
            joined = tuple(torch.where(chosen, *pair) for pair in zip(found, joined, strict=True))
        else:
            joined = torch.where((lengths == length).unsqueeze(-1), found, joined)
    _forget(module, layer_type)
    return joined


def _forget(module: nn.Module, layer_type: str | None) -> None:
    """Back to the frequencies of short documents, where `dynamic` begins."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    own = getattr(module, f"{prefix}inv_freq")
    with torch.no_grad():
        module.register_buffer(
            f"{prefix}inv_freq",
            getattr(module, f"{prefix}original_inv_freq").to(own.device).clone(),
            persistent=False,
        )
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
