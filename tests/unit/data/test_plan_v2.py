"""plan_v2: runs of the second planning go on to the very batches it gave them.

The digests were recorded when it was the newest.
"""

from __future__ import annotations

from typing import Any

import pytest

from raysft.data.plan import blocks, plan_v2
from tests.unit.data.test_plan_v1 import CASES, digest, plan

POOLS: dict[str, dict[str, Any]] = {
    "many pools": {"n": 9000, "weights": (1.0, 1.5)},
    "many pools, two tasks mixed": {
        "n": 9000,
        "tasks": 2,
        "data": {"mix": {"asr": 0.5, "tts": 0.5}, "mode": "padded"},
    },
}
RECORDED = {  # plan hash; digest of the first 150 steps
    "packed": ("f18c5102f9543f9f", "0bd9ccdd0056395a"),
    "packed, no room for even rows": ("3461bab182af9306", "b6ad0cb2094135c2"),
    "padded": ("20e40ffef6c2beba", "aec467598c4b43a2"),
    "two tasks mixed": ("f60f00601b9a5e4c", "7905e34fed56aad3"),
    "weights": ("e674a8fa05ba129f", "35ce3444938df8bf"),
    "the default window": ("9fb760cfc321f9fd", "3d16a82137be43da"),
    "a window of one example": ("2d77417a8b2d8186", "2330c7f778a67000"),
    "many pools": ("9a278346652e2a85", "cdc4a26e0245bd25"),
    "many pools, two tasks mixed": ("ebd9551825dbf626", "2c88310c54cb3357"),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_plan_of_algorithm_2_is_as_it_was_recorded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in POOLS:
        monkeypatch.setattr(blocks, "MAX_BLOCKS", 1000)
        monkeypatch.setattr(plan_v2, "POOL", 2048)
    found = plan(**(POOLS | CASES)[name], algorithm=2)
    assert (found.hash[:16], digest(found.steps(found.start()))[:16]) == RECORDED[name]
