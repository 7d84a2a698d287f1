"""What a worker holds of a gradient between turns does not change what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysft.config import to_yaml
from raysft.config.strategies import WHOLE_BYTES, gradients_of
from raysft.run.lines import read_lines
from tests.support import worlds
from tests.support.worlds import tiny


@pytest.mark.parametrize(
    ("strategy", "size", "replicate"),
    [
        ("fsdp", 2, 1),
        pytest.param("fsdp", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_gradients_reduced_in_each_turn_are_those_reduced_once(
    strategy: str, size: int, replicate: int, tmp_path: Path
) -> None:
    found = {}
    for held in ("whole", "sharded"):
        config = tiny(
            tmp_path,
            held,
            data__lanes=6,
            parallel__strategy=strategy,
            parallel__gradients=held,
            parallel__replicate=replicate,
            parallel__workers=size,
        )
        (tmp_path / f"{held}.yaml").write_text(to_yaml(config))
        assert worlds.run(size, tmp_path / f"{held}.yaml") == 0
        run = tmp_path / "runs" / held
        found[held] = [(m["loss"], m["grad_norm"]) for m in read_lines(run / "metrics.jsonl")]
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        assert held in {event.get("gradients") for event in events}
    assert len(found["whole"]) == 12
    for whole, sharded in zip(found["whole"], found["sharded"], strict=True):
        assert sharded == pytest.approx(whole, rel=1e-5)


def test_small_gradients_are_held_whole_large_ones_are_not() -> None:
    assert gradients_of("auto", WHOLE_BYTES // 4) == "whole"
    assert gradients_of("auto", WHOLE_BYTES // 4 + 1) == "sharded"
    assert gradients_of("whole", WHOLE_BYTES) == "whole"
    assert gradients_of("sharded", 1) == "sharded"
