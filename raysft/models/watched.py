"""Logits of some tokens while answers are generated, as the model gives them: before any sampler,
filter or temperature has changed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList


class Generated(NamedTuple):
    """An answer. tokens: up to the one that ends it. logits: float32 [tokens, watched] of the
    watched ids where each token was chosen. end: the one that ends it; []: it was cut."""

    text: str
    tokens: list[int]
    logits: np.ndarray
    end: list[int] = []  # noqa: RUF012 - of a tuple: nobody changes it


class Watch(LogitsProcessor):
    """Keeps the logits of `ids` [W] of each step, and changes none."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: [R, V]; they are returned as they are."""
        self.steps.append(scores[:, self.ids].float().cpu())
        return scores

    def of(self, row: int, tokens: int) -> np.ndarray:
        """Float32 [tokens, W] of a row."""
        found = [step[row].numpy() for step in self.steps[:tokens]]
        return np.stack(found) if found else np.zeros((0, len(self.ids)), np.float32)


def watching(
    watch: Watch | None, choose: LogitsProcessor | None = None
) -> dict[str, LogitsProcessorList]:
    """What `generate` is told beside its inputs: to keep the logits that are wanted; choose: then
    to leave of each row's the one of the token that it is to take."""
    found = [each for each in (watch, choose) if each is not None]
    return {"logits_processor": LogitsProcessorList(found)} if found else {}


def ended(answer: Sequence[int], stops: Sequence[int]) -> int:
    """Tokens of an answer before the one that ends it."""
    return next((i for i, token in enumerate(answer) if token in stops), len(answer))
