"""plan_v1: runs of the first planning go on to the very batches it gave them.

The digests were recorded when it was the only one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from raysft.config.schema import Data
from raysft.data.plan.generations import Generation, Generations
from raysft.data.plan.plan import Plan, PlannedStep

CASES: dict[str, dict[str, Any]] = {
    "packed": {"n": 3000},
    "packed, no room for even rows": {
        "n": 2000,
        "data": {"tokens_per_batch": 150, "window": 400},
    },
    "padded": {"n": 3000, "data": {"mode": "padded"}},
    "two tasks mixed": {"n": 3000, "tasks": 2, "data": {"mix": {"asr": 0.7, "tts": 0.3}}},
    "weights": {"n": 3000, "weights": (1.0, 2.3, 0.5)},
    "sequential": {"n": 1000, "data": {"order": "sequential"}},
    "sequential, padded, weights": {
        "n": 1000,
        "weights": (1.0, 2.3, 0.5),
        "data": {"order": "sequential", "mode": "padded"},
    },
    "the default window": {"n": 20000, "data": {"window": 4096, "lanes": 8}},
    "a window of one example": {"n": 200, "data": {"window": 1}},
}
RECORDED = {  # plan hash; digest of the first 150 steps
    "packed": ("f242cd57e10e4e63", "bcf5b10e531f15fa"),
    "packed, no room for even rows": ("1889d35f1334133f", "c85afb43926c667b"),
    "padded": ("fb8f46d3411092c3", "3b0a02c60b21ab90"),
    "two tasks mixed": ("23e9a550208a048f", "e2aa9c6a80a6ce3d"),
    "weights": ("0059a0ef93f389eb", "f34f4a70529843e9"),
    "sequential": ("757fc171e43fe6af", "8142c9cc99dd751c"),
    "sequential, padded, weights": ("70cb461c502f662a", "70b72cc573b2ea5a"),
    "the default window": ("50db3e103232e6c9", "661fcd7b7a4206b2"),
    "a window of one example": ("ca91fad0273ef648", "6b66493833a384a8"),
    "extended from epoch 2": ("2767a8251501d434", "a850718b6b288876"),
}


def lengths(n: int, seed: int) -> np.ndarray:
    """Of integer arithmetic alone: the same on every machine and with every numpy."""
    digest = hashlib.shake_256(f"lengths {seed}".encode()).digest(4 * n)
    bits = np.frombuffer(digest, "<u4").astype(np.int64)
    return (3 + bits % 61 + (bits >> 8) % 97 * ((bits >> 16) % 5 == 0)).astype(np.int32)


def plan(
    n: int,
    tasks: int = 1,
    weights: tuple[float, ...] = (1.0,),
    data: dict[str, Any] | None = None,
    algorithm: int = 1,
) -> Plan:
    return Plan(
        lengths(n, 0),
        (lengths(n, 1) % tasks).astype(np.int16),
        ["asr", "tts"][:tasks],
        (np.arange(n) * len(weights) // n).astype(np.int16),
        weights,
        "index",
        Data(**{"lanes": 4, "tokens_per_batch": 400, "window": 256, **(data or {})}),
        7,
        algorithm,
    )


def digest(steps: Iterator[PlannedStep]) -> str:
    found = hashlib.sha256()
    for step in itertools.islice(steps, 150):
        lanes = [lane.tolist() for lane in step.lanes]
        found.update(json.dumps([step.epoch, step.step, lanes, step.after.to_json()]).encode())
    return found.hexdigest()


@pytest.mark.parametrize("name", CASES)
def test_a_plan_of_algorithm_1_is_as_it_was_recorded(name: str) -> None:
    found = plan(**CASES[name])
    assert (found.hash[:16], digest(found.steps(found.start()))[:16]) == RECORDED[name]


def test_data_that_grew_under_algorithm_1_is_planned_as_it_was_recorded() -> None:
    first, second = plan(1000), plan(1400, weights=(1.0, 1.5))
    grown = Generations([Generation(0, 1000, lambda: first), Generation(2, 1400, lambda: second)])
    found = (second.hash[:16], digest(grown.steps(grown.start()))[:16])
    assert found == RECORDED["extended from epoch 2"]


@pytest.mark.parametrize("algorithm", [2, 3])
@pytest.mark.parametrize("name", ["sequential", "sequential, padded, weights"])
def test_order_sequential_is_the_same_in_every_planning(name: str, algorithm: int) -> None:
    old, new = plan(**CASES[name]), plan(**CASES[name], algorithm=algorithm)
    assert old.hash != new.hash
    steps = [itertools.islice(one.steps(one.start()), 150) for one in (old, new)]
    for a, b in zip(*steps, strict=True):
        assert a.after.streams == b.after.streams
        assert [lane.tolist() for lane in a.lanes] == [lane.tolist() for lane in b.lanes]
