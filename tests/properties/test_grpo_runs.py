"""GRPO in processes: workers, strategies and kills change nothing; what earns is learnt."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raysft.audit import audit
from raysft.config.load import validate
from raysft.parallel import World
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.properties.test_bit_identity import state
from tests.support import rewarded, worlds
from tests.support.models import AUDIO, CAUSAL
from tests.support.rewarded import write

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft__method": "lora", "peft__r": 4},
}
MOE = {"model_type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 4}
VIRTUAL = {"peft__virtual_tokens": 3, "data__mode": "padded"}
MORE: dict[str, dict[str, Any]] = {
    "prompt": {"peft__method": "prompt", **VIRTUAL},
    "prefix": {"peft__method": "prefix", **VIRTUAL},
    "mixture": {"model__config": {**CAUSAL["config"], **MOE, "num_experts_per_tok": 2}},
}
ALONE = World(0, 1, torch.device("cpu"))
LOSSES = ("grpo", "dr_grpo", "dapo")


def rollouts(run: Path) -> dict[tuple[int, int], str]:
    """Digest of the answers of each (step, lane)."""
    found = {}
    for file in sorted((run / "ledger").glob("*.jsonl")):
        for line in read_lines(file):
            assert (line["step"], line["lane"]) not in found
            found[line["step"], line["lane"]] = line["rollouts"]
    return found


def gradients(folder: Path, size: int, cells: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """The gradient of the first step of each (strategy, kind, loss)."""
    paths = []
    for strategy, kind, loss in cells:
        changes = {**KINDS[kind], "parallel__strategy": strategy}
        # Learnt twice, so that tokens have an old probability; answers of some groups are left out.
        grpo = {"loss": loss, "updates": 2, "drop_equal": True}
        paths.append(write(folder, f"{strategy}_{kind}_{loss}_{size}", grpo, **changes))
    assert worlds.run(size, *paths, kill_at=-1, module="tests.support.matrix") == 0
    runs = [folder / "runs" / path.stem for path in paths]
    return [load_file(run / "gradient.safetensors") for run in runs]


def differ(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """By how much of the largest of a parameter's gradient, at the most."""
    assert found.keys() == wanted.keys()
    largest = max(float(each.abs().max()) for each in wanted.values())
    assert largest > 1e-4
    return max(float((found[name] - wanted[name]).abs().max()) / largest for name in wanted)


def check_gradients(
    folder: Path,
    sizes: list[int],
    strategies: list[str],
    *kinds: Any,
    found_of: Callable[[Path, int, list[Any]], list[Any]] = gradients,
) -> None:
    """kinds: (kind, loss) of each run. found_of: gives the gradients of runs."""
    alone = [("ddp", *kind) for kind in kinds]
    wanted = dict(zip(alone, found_of(folder, 1, alone), strict=True))
    for size in sizes:
        cells = [(strategy, *kind) for strategy in strategies for kind in kinds]
        for cell, found in zip(cells, found_of(folder, size, cells), strict=True):
            assert differ(found, wanted["ddp", *cell[1:]]) < 1e-5, (size, cell)


def test_gradients_are_those_of_one_process_with_three_workers(tmp_path: Path) -> None:
    check_gradients(tmp_path, [3], ["fsdp"], ("full", "grpo"))


@pytest.mark.slow
def test_gradients_are_those_of_one_process_under_every_normalisation(tmp_path: Path) -> None:
    kinds = [(kind, loss) for kind in KINDS for loss in LOSSES]
    check_gradients(tmp_path, [2, 3], ["ddp", "fsdp"], *kinds)


def zero3(folder: Path) -> dict[str, str]:
    """Changes of a config: zero3, which hides weights that it does not compute with; those of less
    than 100 values stay."""
    settings = folder / "zero3.json"
    settings.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 100}}')
    return {"parallel__strategy": "zero3", "parallel__deepspeed": str(settings)}


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_reference_under_zero3_is_that_of_one_process(kind: str, tmp_path: Path) -> None:
    found = []
    for size, more in ((1, {}), (2, zero3(tmp_path))):
        # Else AdamW makes full steps of what is rounded.
        changes = {**KINDS[kind], "optim__eps": 1e-3, **more}
        path = write(tmp_path, f"of_{size}", {"updates": 2}, **changes)
        assert worlds.run(size, path) == 0
        run = tmp_path / "runs" / path.stem
        lines = read_lines(run / "metrics.jsonl")
        found.append(([(m["loss"], m["term/kl"], m["grad_norm"]) for m in lines], rollouts(run)))
    (wanted, answers), (lines, own) = found
    assert own == answers and all(kl > 1e-5 for _, kl, _ in wanted[1:])
    for line, right in zip(lines, wanted, strict=True):
        assert line == pytest.approx(right, rel=1e-3, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_answers_and_losses_are_the_same_for_every_world_size(kind: str, tmp_path: Path) -> None:
    found = {}
    cells = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (3, "fsdp"), (2, "zero1"), (2, "zero3")]
    for size, strategy in cells if kind in KINDS else cells[:3]:
        changes = {**KINDS, **MORE}[kind] | {"parallel__strategy": strategy, "data__mode": "padded"}
        changes["optim__eps"] = 1e-3  # else AdamW makes full steps of what is rounded
        path = write(tmp_path, f"{strategy}_{size}", {"updates": 2}, **changes)
        assert worlds.run(size, path) == 0
        run = tmp_path / "runs" / path.stem
        lines = [
            (m["loss"], m["grad_norm"], m["reward"]) for m in read_lines(run / "metrics.jsonl")
        ]
        found[size, strategy] = lines, rollouts(run)
        assert audit(run).clean
    wanted, answers = found[1, "ddp"]
    assert len(answers) == 12 and len(set(answers.values())) == 12
    for lines, own in found.values():
        assert own == answers
        for line, right in zip(lines, wanted, strict=True):
            assert line == pytest.approx(right, rel=1e-4, abs=1e-6)


def check_kills(folder: Path, size: int, strategy: str, kind: str, rank: int = 0) -> None:
    """rank: of the worker that dies; another's death is an error in rank 0."""
    changes = {**KINDS, **MORE}[kind] | {"parallel__strategy": strategy, "optim__lr": 3e-3}
    if kind == "lora":
        changes["peft__dropout"] = 0.2
    grpo = {"updates": 2, "drop_equal": True}
    whole, killed = (write(folder, name, grpo, **changes) for name in ("whole", "killed"))
    module = "tests.support.rewarded"
    died = 1 if rank else -signal.SIGKILL
    assert worlds.run(size, whole, killed, kill_at=10 * rank + 4, module=module) == died
    assert worlds.run(size, killed, kill_at=-(10 * rank + 3), module=module) == died
    assert worlds.run(size, killed, module=module) == 0
    runs = [folder / "runs" / name for name in ("whole", "killed")]
    check_same(runs, ("loss", "grad_norm"))
    assert rollouts(runs[0]) == rollouts(runs[1])


def check_same(runs: list[Path], keys: tuple[str, ...]) -> None:
    """Two runs of four steps have the same metrics and the same state, to the last bit."""
    ours, theirs = (
        [[m[key] for key in keys] for m in read_lines(run / "metrics.jsonl")] for run in runs
    )
    assert len(ours) == 4 and ours == theirs
    left, right = (state(run, 4) for run in runs)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.slow
def test_killed_while_sampling_and_between_updates_is_the_same_to_the_last_bit(
    tmp_path: Path,
) -> None:
    check_kills(tmp_path, 2, "fsdp", "full")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_it_is_so_whichever_worker_dies(strategy: str, tmp_path: Path) -> None:
    check_kills(tmp_path, 3, strategy, "lora", rank=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MORE))
def test_experts_and_virtual_positions_are_the_same_to_the_last_bit_after_such_kills(
    kind: str, tmp_path: Path
) -> None:
    check_kills(tmp_path, 2, "ddp", kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "strategy"),
    [*itertools.product((1, 3), ("ddp", "fsdp", "zero2")), (1, "zero3")],
)
def test_every_strategy_is_the_same_to_the_last_bit_after_such_kills(
    size: int, strategy: str, tmp_path: Path
) -> None:
    check_kills(tmp_path, size, strategy, "lora")


def test_a_bandit_learns_which_token_is_rewarded(tmp_path: Path) -> None:
    """One of 260 tokens earns something, and nobody says which."""
    grpo = {"rewards": {"first": 1.0}, "group": 16, "max_new_tokens": 1, "beta": 0.0}
    changes = {"data__lanes": 1, "data__tokens_per_batch": 400, "checkpoint__every": 100}
    tree = rewarded.tree(tmp_path, "run", grpo, train__max_steps=30, **changes)
    job = worlds.start(validate(tree, "here"), World.current())
    train(job)
    lines = read_lines(job.folder / "metrics.jsonl")
    assert lines[0]["reward"] < 0.02 and lines[0]["equal_groups"] > 0.8
    assert sum(line["reward"] for line in lines[-3:]) / 3 > 0.9
    assert all(line["completion_tokens"] == 1 for line in lines)


def test_groups_that_all_earn_the_same_teach_nothing_and_are_counted(tmp_path: Path) -> None:
    grpo = {"rewards": {"accuracy": 1.0}, "drop_equal": True, "updates": 2}
    changes = {"data__lanes": 1, "train__max_steps": 2}
    job = worlds.start(validate(rewarded.tree(tmp_path, "run", grpo, **changes), "here"), ALONE)
    before = [p.detach().clone() for p in job.strategy.module.parameters()]
    train(job)
    after = job.strategy.module.parameters()
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    for line in read_lines(job.folder / "metrics.jsonl"):
        assert line["equal_groups"] == 1.0 and line["examples"] > 1
        assert (line["supervised_tokens"], line["grad_norm"], line["loss"]) == (0, 0.0, 0.0)
        assert line["reward"] == line["reward_std"] == 0.0 and line["completion_tokens"] > 1


@pytest.mark.slow
def test_a_model_that_hears_learns_what_is_rewarded(make_clips: Any, tmp_path: Path) -> None:
    grpo = {"rewards": {"early": 1.0}, "group": 8, "max_new_tokens": 4, "beta": 0.01}
    changes = {"data__train": [{"path": str(make_clips(30))}], "data__tokens_per_batch": 300}
    changes |= {"model": AUDIO, "train__max_steps": 30}
    model = changes.pop("model")
    tree = rewarded.tree(tmp_path, "run", grpo, **changes) | {"model": model}
    job = worlds.start(validate(tree, "here"), World.current())
    train(job)
    rewards = [line["reward"] for line in read_lines(job.folder / "metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
