"""Speech tokens as a source has them -> rows of codes, as places in the model's one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raysft.errors import BadExample

if TYPE_CHECKING:
    from raysft.families.flow_decoder.config import FlowDecoderConfig

FIRST, SECOND = 2, 3  # tokens of each codebook in a group
GROUP = FIRST + SECOND


def rows_count(tokens: int, config: FlowDecoderConfig) -> int:
    """Rows of so many tokens. Raises BadExample where they are no whole groups."""
    if len(config.codebooks or []) == 1:
        return tokens
    if tokens % GROUP:
        raise BadExample(
            f"has {tokens} speech tokens, no whole groups of {GROUP}: of two codebooks {FIRST} "
            f"tokens of the first and {SECOND} of the second take turns",
            "unknown unit",
        )
    return tokens // GROUP * SECOND


def codes_of(ids: Sequence[int], config: FlowDecoderConfig) -> np.ndarray:
    """int32 [rows, codebooks]. Raises BadExample for a token that is none of its codebook's.

    Of two codebooks a group a, b, x, y, z becomes (a, x), (b, y), (nothing, z), as Step-Audio's
    decoder reads it.
    """
    books = config.codebooks or []
    found = np.asarray(ids, np.int64)
    rows = rows_count(len(found), config)
    if len(books) == 1:
        _check(found, np.arange(len(found)), 0, books[0], "the codebook")
        return found.astype(np.int32)[:, None]
    size = books[0]
    at = np.arange(len(found))
    inner = at % GROUP
    first, second = inner < FIRST, inner >= FIRST
    _check(found[first], at[first], 0, size, "the first codebook")
    _check(found[second], at[second], size, size + books[1], "the second codebook")
    groups = found.reshape(-1, GROUP)
    nothing = np.full((len(groups), SECOND - FIRST), size)
    left = np.concatenate([groups[:, :FIRST], nothing], 1)
    right = groups[:, FIRST:] + 1  # behind the row that stands for nothing
    return np.stack([left, right], 2).reshape(rows, 2).astype(np.int32)


def _check(ids: np.ndarray, places: np.ndarray, low: int, high: int, book: str) -> None:
    wrong = np.flatnonzero((ids < low) | (ids >= high))
    if len(wrong):
        first = wrong[0]
        raise BadExample(
            f"unit {ids[first]}, but there are {low} to {high - 1} in {book} of "
            f"model.config.codebooks (token {places[first]}); are these tokens of another "
            "tokenizer?",
            "unknown unit",
        )
