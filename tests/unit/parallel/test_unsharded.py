"""Evaluation under fsdp on whole weights: no collective a token, the same answers, and training
goes on as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from raysft.data.example import Sequence
from raysft.models import SpeechModel
from raysft.parallel import Strategy, World, make_strategy, unsharded
from raysft.run.evaluations import duration
from raysft.run.lines import read_lines
from tests.properties.test_bit_identity import write
from tests.support import worlds
from tests.support.model_zoo import batch_of, make, sequences
from tests.support.zero_lab import make_config

LENGTHS = [9, 4, 17]


def made(world: World, strategy: str = "fsdp") -> tuple[SpeechModel, Strategy]:
    model = make("llama")
    return model, make_strategy(make_config(strategy), model.supervised, world)


def step(model: SpeechModel, strategy: Strategy) -> float:
    batch = model.collate(batch_of(*sequences(model, LENGTHS)))
    with strategy.accumulate(last=True):
        loss = strategy.module(batch)[0].trained
        strategy.backward(loss)
    return strategy.step(1.0).norm


def prompts(model: SpeechModel, count: int) -> list[Sequence]:
    return sequences(model, [5, 8, 6][:count], seed=3)


def sharded(module: nn.Module) -> list[bool]:
    return [isinstance(parameter, DTensor) for parameter in module.parameters()]


def _evaluates(rank: int, folder: Path) -> None:
    """One of two workers, which have other numbers of prompts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World.current()
    gathered, gather = [], dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda *a, **k: gathered.append(1) or gather(*a, **k)
    model, strategy = made(world)
    found: dict[str, Any] = {"first": step(model, strategy)}
    with strategy.whole() as whole:
        assert not any(sharded(strategy.module))
        gathered.clear()
        with torch.inference_mode():
            if rank == 0:  # the other has none to answer, and waits for nobody
                found["answers"] = model.generate(prompts(model, 3), 6)
        found["collectives"] = len(gathered)
    found["whole"] = whole is True
    assert all(sharded(strategy.module))
    with torch.no_grad():
        strategy.module(model.collate(batch_of(*sequences(model, LENGTHS))))
    found["gathers again"] = len(gathered)
    found["second"] = step(model, strategy)
    unsharded.SHARE = 0.0  # there is no room
    with strategy.whole() as whole:
        found["without room"] = whole is True
        answers = model.generate(prompts(model, 3 - rank), 6, synced_gpus=True)
        found["gathered"] = answers
    found["third"] = step(model, strategy)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_weights_travel_once_and_training_goes_on_as_without(tmp_path: Path) -> None:
    workers = [worlds.fork(_evaluates, rank, tmp_path) for rank in range(2)]
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    model, strategy = made(World(0, 1, torch.device("cpu")), "ddp")
    # Both workers have had the same micro-batch: their mean is that of one.
    norms = [step(model, strategy)]
    expected = model.generate(prompts(model, 3), 6)
    norms.append(step(model, strategy))
    later = model.generate(prompts(model, 3), 6)
    norms.append(step(model, strategy))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [found[key] for key in ("first", "second", "third")] == pytest.approx(
            norms, rel=1e-5
        )
        assert found["whole"] and not found["without room"]
        assert found["collectives"] == 0 and found["gathers again"] > 0
        assert found["gathered"] == later[: 3 - rank]
        assert found.get("answers", expected) == expected


@pytest.mark.slow
def test_a_run_evaluates_with_the_figures_of_ddp(tmp_path: Path) -> None:
    """Two workers, and an odd number of batches: one has nothing to answer in the last round."""
    keys: dict[str, Any] = {
        "evaluate": {"at_end": True, "generate": True, "every": 6, "tokens_per_batch": 100}
    }
    keys["evaluate"]["metrics"] = {"asr": ["wer"], "tts": [], "none": []}
    paths = [write(tmp_path, name, name, keys) for name in ("ddp", "fsdp")]
    assert worlds.run(2, *paths) == 0
    first, second = (
        read_lines(tmp_path / "runs" / name / "eval.jsonl") for name in ("ddp", "fsdp")
    )
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for one, other in zip(first, second, strict=True):
        numbers = [key for key, value in one.items() if isinstance(value, float)]
        assert any(key.startswith("eval_loss") or "loss" in key for key in numbers)
        for key in set(numbers) - {"time", "seconds"}:
            assert other[key] == pytest.approx(one[key], rel=1e-4), key


def test_how_long_it_takes_is_said_in_few_words() -> None:
    assert [duration(s) for s in (3.4, 89, 300, 9000)] == ["3 s", "89 s", "5 min", "2.5 h"]
    assert np.isfinite(unsharded.free_bytes(torch.device("cpu")))
