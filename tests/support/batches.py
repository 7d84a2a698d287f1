"""Micro-batches held against each other, for tests."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from raysft.data.example import MicroBatch, Ragged


def differences(one: MicroBatch, other: MicroBatch) -> list[str]:
    """The fields that are not equal to the bit, with dtypes and shapes; [] where all are."""
    return [f.name for f in fields(MicroBatch) if _flat(one, f.name) != _flat(other, f.name)]


def _flat(batch: MicroBatch, name: str) -> Any:
    value = getattr(batch, name)
    if name == "arrays":
        return {
            key: [_bits(getattr(each, f.name)) for f in fields(Ragged)]
            for key, each in value.items()
        }
    return _bits(value) if isinstance(value, np.ndarray) else value


def _bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, array.tobytes()
