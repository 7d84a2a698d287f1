"""What a worker holds of a gradient between turns does not change what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from raysft.config import to_yaml
from raysft.config.strategies import WHOLE_BYTES, gradients_of
from raysft.parallel import World, make_strategy
from raysft.run.lines import read_lines
from tests.support import worlds
from tests.support.model_zoo import batch_of, make, sequences
from tests.support.worlds import tiny
from tests.support.zero_lab import make_config


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


def _holds(folder: Path) -> None:
    """A process: what its parameters hold before a step's last turn."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    found = {}
    for held in ("whole", "sharded"):
        model = make("llama")
        config = make_config("fsdp")
        parallel = config.parallel.model_copy(update={"gradients": held})
        config = config.model_copy(update={"parallel": parallel})
        strategy = make_strategy(config, model.supervised, World.current())
        with strategy.accumulate(last=False):
            batch = model.collate(batch_of(*sequences(model, [9, 4])))
            strategy.backward(strategy.module(batch)[0].trained)
        found[held] = [p.grad is not None for p in strategy.module.parameters()]
    (folder / "found.json").write_text(json.dumps(found))


def test_between_turns_shards_have_their_gradient_only_if_it_is_sharded(tmp_path: Path) -> None:
    process = worlds.fork(_holds, tmp_path)
    process.join()
    assert process.exitcode == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(found["sharded"])
    assert not any(found["whole"])


def test_small_gradients_are_held_whole_large_ones_are_not() -> None:
    assert gradients_of("auto", WHOLE_BYTES // 4) == "whole"
    assert gradients_of("auto", WHOLE_BYTES // 4 + 1) == "sharded"
    assert gradients_of("whole", WHOLE_BYTES) == "whole"
    assert gradients_of("sharded", 1) == "sharded"
