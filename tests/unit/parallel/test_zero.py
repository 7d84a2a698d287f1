"""zero1, zero2 and zero3 against plain torch, in real processes over gloo.

The processes are started once and go through all scenarios (`zero_lab`); each test looks at what
was found in one. tests/properties/test_matrix.py has whole runs, with adapters.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raysft.errors import UserError
from raysft.parallel import World, make_strategy
from raysft.parallel.ddp import Ddp
from raysft.run.lines import read_lines
from tests.support import worlds
from tests.support.models import AUDIO
from tests.support.zero_lab import (
    CLIP,
    IDLE,
    SIZES,
    STAGES,
    STEPS,
    Reference,
    is_slow,
    make_config,
    net,
    plain,
    sharded,
    sparse,
    take_step,
    whole_state,
    work,
)

Lab = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """What the processes found in a scenario; they start when the first one is asked for."""
    folder = tmp_path_factory.mktemp("zero")

    @cache
    def go(slow: bool) -> None:
        for size in SIZES if not slow else (2,):
            processes = [worlds.fork(work, rank, size, slow, folder) for rank in range(size)]
            for process in processes:
                process.join(timeout=500)
            assert [process.exitcode for process in processes] == [0] * size

    def found(name: str, size: int = 2) -> dict[str, Any]:
        go(is_slow(name))
        return torch.load(folder / f"{name}_{size}.pt")

    return found


def each_stage(*kinds: str, name: str = "{kind} {stage}") -> Any:
    """Parameters kind and stage; slow where the scenario of that name is."""
    return pytest.mark.parametrize(
        ("kind", "stage"),
        [
            pytest.param(
                kind,
                stage,
                marks=[pytest.mark.slow] if is_slow(name.format(kind=kind, stage=stage)) else [],
            )
            for kind in kinds
            for stage in STAGES
        ],
    )


@pytest.fixture(scope="module")
def reference() -> Reference:
    return plain()


def assert_same_steps(lines: list[Any], expected: list[Any], rel: float = 1e-5) -> None:
    """Losses and norms."""
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        assert line[:2] == pytest.approx(other[:2], rel=rel)


def assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To the last bit."""
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


# -- the same training ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*STAGES, *(f"optimizer {s}" for s in STAGES), "parameters zero3", "sharded zero3"]
)
def test_losses_norms_and_weights_are_those_of_plain_torch(
    name: str, lab: Lab, reference: Reference
) -> None:
    """Uneven lanes, clipping in every step, groups with rates of their own; with offload too.

    AdamW hides a wrong scale of gradients: their norms do not, nor does a clip that always acts.
    """
    found = lab(name)
    lines, weights = reference
    assert all(norm > CLIP for _, norm in lines)
    assert_same_steps(found["lines"], lines)
    for key, tensor in weights.items():
        torch.testing.assert_close(found["after"][f"model.{key}"], tensor, rtol=1e-5, atol=1e-6)


@each_stage("frozen", "adapters")
def test_frozen_parameters_stay_and_are_saved_only_without_adapters(
    stage: str, kind: str, lab: Lab
) -> None:
    found = lab(f"{kind} {stage}")
    lines, weights = plain(freeze=True)
    assert_same_steps(found["lines"], lines)
    frozen = {key for key in found["after"] if key.startswith("model.base.")}
    assert frozen == ({"model.base.weight", "model.base.bias"} if kind == "frozen" else set())
    assert not [key for key in found["after"] if key.startswith("optim.base.")]
    for key in frozen:
        assert torch.equal(found["after"][key], weights[key.removeprefix("model.")])


def test_a_head_with_new_rows_keeps_workers_of_zero3_in_step(lab: Lab) -> None:
    """Under zero3 its parts are gathered at every call, so every worker has to make as many."""
    lines = lab("new rows zero3")["lines"]
    assert len(lines) == 3
    assert_same_steps(lines, lab("new rows ddp")["lines"])


@pytest.mark.parametrize("strategy", IDLE)
def test_experts_that_are_modules_each_get_their_gradients(strategy: str, lab: Lab) -> None:
    """Each worker calls other experts than its neighbour: others have no gradient of their own."""
    expected, _ = plain(module=sparse(), steps=3)
    assert_same_steps(lab(f"idle experts {strategy}")["lines"], expected)


@each_stage("bf16", "fp16")
def test_half_precision_is_near_that_of_ddp(stage: str, kind: str, lab: Lab) -> None:
    """fp16 begins with the same steps that overflow."""
    found, expected = lab(f"{kind} {stage}"), lab(f"{kind} ddp")
    skipped = [line[2] for line in expected["lines"]]
    assert [line[2] for line in found["lines"]] == skipped
    assert any(skipped) == (kind == "fp16")
    assert_same_steps(
        [line for line in found["lines"] if not line[2]],
        [line for line in expected["lines"] if not line[2]],
        rel=2e-2,
    )
    assert {tensor.dtype for tensor in found["after"].values()} == {torch.float32}


# -- steps that change nothing --------------------------------------------------------------------


@each_stage("fp32", "bf16", "fp16", "offload", name="disturbed {kind} {stage}")
def test_a_nan_on_one_worker_and_a_dropped_step_change_nothing(
    stage: str, kind: str, lab: Lab
) -> None:
    found = lab(f"disturbed {kind} {stage}")
    assert found["nan"][2], "the step is skipped"
    assert not math.isfinite(found["nan"][1])
    assert_equal(found["after_nan"], found["before"])
    assert_equal(found["after_drop"], found["before"])
    scale, after = (found[k]["loss_scale"]["value"] for k in ("facts", "facts_after_nan"))
    assert after == (scale / 2 if kind == "fp16" else scale)
    assert found["facts_after_drop"] == found["facts_after_nan"]
    others = {"fp32": stage, "offload": f"optimizer {stage}"}
    undisturbed = lab(others.get(kind, f"{kind} {stage}"))
    finite = [line for line in found["lines"] if not line[2]]
    expected = [line for line in undisturbed["lines"] if not line[2]]
    if kind != "fp16":  # another loss scale rounds differently
        assert finite == expected, "later steps are as if nothing had happened"


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_state_holds_what_ddp_saves(stage: str, freeze: bool, lab: Lab) -> None:
    """Names, shapes and dtypes, tied weights and buffers among them; before the first step too."""
    world = World(0, 1, torch.device("cpu"))
    ddp = Ddp(make_config("ddp"), net(freeze), world)
    for step in range(1, STEPS + 1):
        take_step(ddp, world, step)
    expected = whole_state(ddp, world)
    found = lab(f"frozen {stage}" if freeze else stage)
    assert "model.kept" in expected and "model.derived" not in expected
    for state in (found["before"], found["after"]):
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
            k: (v.shape, v.dtype) for k, v in expected.items()
        }
    for key, tensor in expected.items():
        torch.testing.assert_close(found["after"][key], tensor, rtol=1e-4, atol=1e-6)
    fresh = [v for k, v in found["before"].items() if k.startswith("optim.")]
    assert not any(tensor.any() for tensor in fresh), "AdamW begins at step 0"


@pytest.mark.parametrize("name", ["handed over", "handed back"])
def test_a_run_goes_from_strategy_to_strategy(name: str, lab: Lab, reference: Reference) -> None:
    """Read in many parts."""
    assert_same_steps(lab(name)["lines"], reference[0])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_with_one_worker_and_with_three(
    stage: str, lab: Lab, reference: Reference
) -> None:
    lines = [line for size in SIZES for line in lab(f"resized {stage}", size)["lines"]]
    assert_same_steps(lines, reference[0])


@each_stage("", "bf16 ", "optimizer ", name="resumed {kind}{stage}")
def test_a_resumed_run_is_the_same_to_the_last_bit(stage: str, kind: str, lab: Lab) -> None:
    found, undisturbed = lab(f"resumed {kind}{stage}"), lab(f"{kind}{stage}")
    assert found["lines"] == undisturbed["lines"]
    assert_equal(found["after"], undisturbed["after"])


def test_weights_alone_leave_the_optimizer_as_it_is(lab: Lab) -> None:
    found = lab("weights only")
    for state in found["found"].values():
        for key, tensor in state.items():
            if key.startswith("model."):
                assert torch.equal(tensor, found["saved"][key])
            else:
                assert not tensor.any()


# -- refusals -------------------------------------------------------------------------------------


def test_without_a_process_group_the_remedy_is_named() -> None:
    with pytest.raises(UserError, match="zero2 needs a process group; use ddp in one process"):
        make_strategy(make_config("zero2"), net(), World(0, 1, torch.device("cpu")))


# -- whole runs -----------------------------------------------------------------------------------


def write_config(folder: Path, corpus: Path, name: str, **changes: Any) -> Path:
    """An audio model that is evaluated, with generated answers, and saved in the middle."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "data": {"train": [str(corpus)], "eval": [str(corpus)], "lanes": 3},
        "model": AUDIO,
        "parallel": {},
        "optim": {"lr": 1e-3, "weight_decay": 0.01, "clip": 0.5},
        "train": {"max_steps": STEPS},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 3},
        "evaluate": {"every": 5, "max_examples": 5, "max_new_tokens": 6},
    }
    tree["data"] |= {"tokens_per_batch": 500, "window": 40}
    for key, value in changes.items():
        section, _, key = key.partition("__")
        tree[section][key] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_runs_are_those_of_one_process_through_kills_and_resizes(
    make_clips: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under zero3 parameters are sharded for real, recomputed, and used by generation."""
    corpus = make_clips(40)

    def results(name: str) -> list[tuple[Any, ...]]:
        run = tmp_path / "runs" / name
        lines = read_lines(run / "metrics.jsonl")
        scores = read_lines(run / "eval.jsonl")
        return [
            *((line["step"], line["loss"], line["grad_norm"]) for line in lines),
            *((line["step"], line["loss/asr"], line["cer/train"]) for line in scores),
        ]

    assert worlds.run(1, write_config(tmp_path, corpus, "reference")) == 0
    expected = results("reference")
    assert len(expected) == STEPS + 2
    for strategy in STAGES:
        changes = {"parallel__strategy": strategy}
        if strategy == "zero3":
            changes |= {"parallel__deepspeed": sharded(tmp_path)}
            changes |= {"train__gradient_checkpointing": True}
        config = write_config(tmp_path, corpus, strategy, **changes)
        for size, kill_at in ((2, 4), (1, 7)):
            assert worlds.run(size, config, kill_at=kill_at) == -signal.SIGKILL
        capfd.readouterr()
        assert worlds.run(3, config) == 0
        assert capfd.readouterr().out == "", "DeepSpeed says nothing"
        found = results(strategy)
        assert len(found) == len(expected)
        for line, other in zip(found, expected, strict=True):
            assert line == pytest.approx(other, rel=1e-5)
