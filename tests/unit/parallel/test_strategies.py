"""The rows of the strategies say what their classes do, and one from outside is as good as ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import typing
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from raysft.config import Config, strategies, to_yaml
from raysft.config.combinations import contradictions
from raysft.config.load import validate
from raysft.config.schema import Parallel
from raysft.config.strategies import STRATEGIES, StrategyTraits
from raysft.errors import Mistake, UserError
from raysft.parallel import Strategy, World, make_strategy, register
from raysft.parallel.ddp import Ddp
from raysft.parallel.make import load_class
from tests.support import worlds
from tests.support.matrix import shards
from tests.support.zero_lab import lane, make_config, net, sharded, take_step

ONE = World(0, 1, torch.device("cpu"))
DENSE = [traits for traits in STRATEGIES.values() if "experts" not in traits.shards]
TREE: dict[str, Any] = {"data": {"train": [__file__]}, "model": {"path": "a/base"}}


class Outside(Ddp):
    """A strategy that is not in the package."""


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(strategies, "STRATEGIES", dict(STRATEGIES))


# -- rows and classes ----------------------------------------------------------------------------


def test_every_name_of_the_config_has_a_row_and_every_row_a_class() -> None:
    assert list(STRATEGIES) == ["ddp", "fsdp", "zero1", "zero2", "zero3", "ep"]
    for name in STRATEGIES:
        assert Parallel.model_validate({"strategy": name}).strategy == name
    with pytest.raises(ValueError, match="'zero3' or 'ep'"):
        Parallel.model_validate({"strategy": "zero4"})
    assert [traits.name for traits in STRATEGIES.values()] == list(STRATEGIES)
    asked = [name for name, value in vars(Strategy).items() if callable(value) and name[0] != "_"]
    assert "step" in asked
    for traits in STRATEGIES.values():
        assert all(callable(getattr(load_class(traits), name)) for name in asked)


def test_what_a_row_refuses_is_a_value_of_a_key_and_is_refused() -> None:
    for traits in STRATEGIES.values():
        for refusal in traits.refuses:
            section, _, key = refusal.key.partition(".")
            tree = {"parallel": {"strategy": traits.name}, section: {key: refusal.value}}
            config = Config.model_validate(tree)
            assert attrgetter(refusal.key)(config) == refusal.value
            assert Mistake.of(refusal.key, refusal.why) in contradictions(config)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_row_names_what_can_be_offloaded_and_replicated(name: str) -> None:
    def refused(**parallel: Any) -> bool:
        key = next(iter(parallel))
        tree = {**TREE, "data": {}, "parallel": {"strategy": name, "workers": 2, **parallel}}
        lines = contradictions(Config.model_validate(tree))
        return any(line.key == f"parallel.{key}" for line in lines)

    traits = STRATEGIES[name]
    for offload in typing.get_args(strategies.Offload):
        assert refused(offload=offload) is (offload not in traits.offloads)
    assert refused(replicate=2) is (not traits.replicates)
    assert refused(ep_size=2) is ("experts" not in traits.shards)


def _said(rank: int, folder: Path, small_too: str) -> None:
    """What each strategy shards, and whether its forward pass is a collective, as it shows in one
    of two workers after a step."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    world, found = World.current(), {}
    for traits in DENSE:
        module = net()
        total = sum(parameter.numel() for parameter in module.parameters())
        # As it is, zero3 keeps what is as small as this.
        small = {"parallel__deepspeed": small_too} if traits.stage == 3 else {}
        made = make_strategy(make_config(traits.name, **small), module, world)
        take_step(made, world, 1)
        optimizer = getattr(made, "_adamw", None) or made.optimizer  # type: ignore[attr-defined]
        held = {
            "weights": sum(part.numel() for _, part in shards(made.module).values()),
            "moments": sum(_local(state["exp_avg"]) for state in optimizer.state.values()),
        }
        stage = getattr(made.module, "zero_optimization_stage", lambda: None)()
        with torch.no_grad(), CommDebugMode() as collectives:
            made.module(lane(1, rank))
        found[traits.name] = {
            "shards": [part for part, count in held.items() if count < total],
            "synced": collectives.get_total_counts() > 0,
            "stage": None if stage is None else int(stage),
            "gradients": bool(stage) and made.module.zero_optimization_partition_gradients(),
        }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _local(tensor: torch.Tensor) -> int:
    return getattr(tensor, "to_local", lambda: tensor)().numel()


def test_two_workers_share_what_the_row_says(tmp_path: Path) -> None:
    small_too = sharded(tmp_path)
    workers = [worlds.fork(_said, rank, tmp_path, small_too) for rank in range(2)]
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert list(found) == [traits.name for traits in DENSE]
        for traits in DENSE:
            said = found[traits.name]
            assert said["shards"] == [part for part in traits.shards if part != "gradients"]
            assert (said["synced"], said["stage"]) == (traits.synced, traits.stage)
            if traits.stage is not None:  # where torch shards, gradients are as their weights
                assert said["gradients"] is ("gradients" in traits.shards)
            else:
                assert ("gradients" in traits.shards) is ("weights" in traits.shards)


# -- from outside --------------------------------------------------------------------------------


@pytest.mark.usefixtures("tables")
def test_a_strategy_from_outside_is_read_from_a_config_and_made() -> None:
    wrong = {**TREE, "parallel": {"strategy": "outside"}}
    with pytest.raises(UserError, match=r"parallel\.strategy: expected 'ddp', 'fsdp'"):
        validate(wrong, "config")
    refusal = strategies.Refusal("train.compile", True, "outside compiles nothing; use ddp")
    traits = StrategyTraits("outside", ("weights",), ("parameters",), refuses=(refusal,))
    register(traits, f"{__name__}:Outside")
    tree = {**TREE, "parallel": {"strategy": "outside", "offload": "parameters"}}
    config = validate(tree, "config")
    assert "strategy: outside" in to_yaml(config)
    made = make_strategy(config, nn.Linear(2, 2), ONE)
    assert type(made).__name__ == "Outside"
    with pytest.raises(UserError, match=r"train\.compile: outside compiles nothing; use ddp"):
        validate({**tree, "train": {"compile": True}}, "config")
    with pytest.raises(UserError, match=r"only fsdp has copies of shards, not outside"):
        validate({**tree, "parallel": {"strategy": "outside", "replicate": 2}}, "config")


@pytest.mark.usefixtures("tables")
def test_a_name_is_taken_once() -> None:
    with pytest.raises(UserError, match="strategy 'ddp' is there already"):
        register(replace(STRATEGIES["fsdp"], name="ddp"), f"{__name__}:Outside")
    assert STRATEGIES["ddp"].implementation == "raysft.parallel.ddp:Ddp"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fsdpp", "unknown strategy 'fsdpp'; did you mean fsdp?"),
        ("zero4", "unknown strategy 'zero4'; did you mean zero3?"),
        ("tensor", "unknown strategy 'tensor' (there are ddp, fsdp, zero1, zero2, zero3, ep)"),
    ],
)
def test_a_strategy_that_there_is_not_is_no_ddp(name: str, said: str) -> None:
    config = Config()
    config.parallel.strategy = name  # type: ignore[assignment]
    with pytest.raises(UserError, match=re.escape(f"parallel.strategy: {said}")):
        make_strategy(config, nn.Linear(2, 2), ONE)


# -- what is imported ----------------------------------------------------------------------------


def test_the_rows_are_read_without_torch_and_the_interface_without_its_classes() -> None:
    code = (
        "import sys, raysft.config.strategies; assert 'torch' not in sys.modules\n"
        "import raysft.parallel.make; from raysft.config.strategies import STRATEGIES\n"
        "places = [row.implementation or '' for row in STRATEGIES.values()]\n"
        "print(*{place.partition(':')[0] for place in places} & set(sys.modules))"
    )
    run = [sys.executable, "-c", code]
    found = subprocess.run(run, cwd=worlds.ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
