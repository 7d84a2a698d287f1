"""How many copies of a model fsdp shards: one on each node where it fits; told; the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raysft.config import Config, to_yaml
from raysft.driver import preview
from raysft.driver.placed import Placed
from raysft.run.lines import read_lines
from raysft.train.estimate import Estimate
from raysft.train.replicas import Copies, choose, decide
from tests.support import worlds
from tests.support.worlds import tiny

GB = 10**9
GPU = 80.0 * GB


def model(parameters: float, activations: float = 0.0, whole: bool = False) -> Estimate:
    """All weights trained: 16 bytes a parameter, all of it shared but, asked so, gradients."""
    held = {"weights": 4, "gradients": 4, "moments": 8}
    return Estimate(
        {part: int(size * parameters) for part, size in held.items()},  # type: ignore[misc]
        frozenset({"weights", "moments"} | (set() if whole else {"gradients"})),
        activations,
    )


# Where workers are, the model, the smallest GPU: how many copies, and a word of the reason.
CASES: dict[str, tuple[list[str], Estimate, float | None, int, str]] = {
    "an 8B model on nodes of 8": (["a"] * 8 + ["b"] * 8, model(8e9), GPU, 2, "has room"),
    "ranks of nodes in turns": (["a", "b"] * 8, model(8e9), GPU, 2, "has room"),
    "one node": (["a"] * 8, model(8e9), GPU, 1, "one node"),
    "a 70B model": (["a"] * 8 + ["b"] * 8, model(70e9), GPU, 1, "too large for one node"),
    "40 GB is half of a GPU": (["a"] * 2 + ["b"] * 2, model(5e9), GPU, 2, "has room"),
    "and a byte more is not": (["a"] * 2 + ["b"] * 2, model(5e9 + 1), GPU, 1, "too large"),
    "activations that fit": (["a"] * 2 + ["b"] * 2, model(5e9, 17.5 * GB), GPU, 2, "has room"),
    "and that do not": (["a"] * 2 + ["b"] * 2, model(5e9, 17.7 * GB), GPU, 1, "too large"),
    "whole gradients": (["a"] * 4 + ["b"] * 4, model(9e9, whole=True), GPU, 1, "too large"),
    "a smaller GPU": (["a"] * 8 + ["b"] * 8, model(8e9), GPU / 4, 1, "too large"),
    "uneven nodes": (["a"] * 8 + ["b"] * 4, model(1e9), GPU, 1, "unequal numbers of workers: 4, 8"),
    "a GPU a node": (["a", "b", "c"], model(1e9), GPU, 1, "a node has one worker"),
    "CPUs": (["a"] * 2 + ["b"] * 2, model(1e6), None, 1, "on CPUs"),
    "five nodes": (list("abcde") * 4, model(1e9), GPU, 5, "has room"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_node_gets_a_copy_where_it_fits(case: str) -> None:
    nodes, found, memory, copies, why = CASES[case]
    chosen = choose(nodes, found, memory)
    assert (chosen.number, why in chosen.why) == (copies, True), chosen


def test_a_number_is_taken_as_it_is_and_host_memory_holds_one_copy() -> None:
    nodes = ["a"] * 8 + ["b"] * 8

    def decided(**parallel: Any) -> Copies:
        config = Config.model_validate({"parallel": {"strategy": "fsdp", **parallel}})
        return decide(config, model(1e9), nodes, GPU)

    assert decided().number == 2
    assert decided(replicate=1) == Copies(1, "as set")
    assert decided(replicate=4) == Copies(4, "as set")
    assert decided(offload="parameters").number == 1


def test_what_a_search_of_budgets_did_not_copy_no_run_copies() -> None:
    """The search knows no activations; what it measured has to hold for the run."""
    nodes = ["a"] * 4 + ["b"] * 4
    for parameters in (1e9, 9e9, 9.9e9, 10.1e9, 14e9):
        searched = choose(nodes, model(parameters), GPU).number
        for activations in (0.0, 1 * GB, 20 * GB, 60 * GB):
            assert choose(nodes, model(parameters, activations), GPU).number <= searched


def train(folder: Path, size: int, runs: dict[str, dict[str, Any]]) -> list[list[float]]:
    """Losses of runs, by name their changes, of `size` processes, two to a node."""
    paths = [folder / f"{name}.yaml" for name in runs]
    settings = {"parallel__strategy": "fsdp", "parallel__workers": size, "data__lanes": 4}
    for path, (name, changes) in zip(paths, runs.items()):
        path.write_text(to_yaml(tiny(folder, name, **{**settings, **changes})))
    assert worlds.run(size, *paths, module="tests.support.nodes") == 0
    lines = [read_lines(folder / "runs" / name / "metrics.jsonl") for name in runs]
    return [[line["loss"] for line in run] for run in lines]


def of(folder: Path, name: str, size: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / name / f"nodes_{size}.json").read_text())
    return found


def test_two_nodes_of_two_hold_a_copy_each_and_train_alike(tmp_path: Path) -> None:
    steps = {"train__max_steps": 5}
    copies, one = train(tmp_path, 4, {"auto": steps, "one": {**steps, "parallel__replicate": 1}})
    assert of(tmp_path, "auto", 4) == {"groups": [[0, 2], [1, 3]], "nodes": [[0, 0], [1, 1]]}
    started = read_lines(tmp_path / "runs" / "auto" / "events.jsonl")[0]
    assert started["replicate"]["copies"] == 2
    assert "one node has room: a GPU of 80.0 GB" in started["replicate"]["why"]
    assert of(tmp_path, "one", 4)["groups"] == [[0, 1, 2, 3]]
    assert copies == pytest.approx(one, rel=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_with_other_copies_on_other_nodes(tmp_path: Path) -> None:
    """Four workers of two nodes, then two of one, then one copy over all, then again as it was."""
    (whole,) = train(tmp_path, 4, {"whole": {"train__max_steps": 8}})
    for steps, size, changes in (
        (2, 4, {}),
        (4, 2, {}),
        (6, 4, {"parallel__replicate": 1}),
        (8, 4, {}),
    ):
        (moved,) = train(tmp_path, size, {"moved": {"train__max_steps": steps, **changes}})
    assert of(tmp_path, "moved", 4)["groups"] == [[0, 2], [1, 3]]
    assert of(tmp_path, "moved", 2)["groups"] == [[0, 1]]
    assert moved == pytest.approx(whole, rel=1e-5)
    events = read_lines(tmp_path / "runs" / "moved" / "events.jsonl")
    chosen = [e.get("replicate", {}).get("copies") for e in events if "workers" in e]
    assert chosen == [2, 1, None, 2]


def test_a_dry_run_says_how_many_copies_there_would_be(tmp_path: Path) -> None:
    config = tiny(tmp_path, parallel__strategy="fsdp", parallel__workers=2, data__lanes=4)
    four = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"workers": 4})}, deep=True
    )

    def said(config: Config, placed: Placed | None) -> str:
        lines = preview.dry_run(worlds.resolved(config), placed=placed).splitlines()
        return next(line for line in lines if line.startswith("sharding"))

    two_nodes = Placed(["a", "a", "b", "b"], GPU)
    assert "2 copies of the model, each sharded over 2 workers (auto: one" in said(four, two_nodes)
    assert "sharded over all 4 workers (auto: too large" in said(four, Placed(two_nodes.nodes, 1e5))
    assert "over all 4 workers (auto: assumed here" in said(four, Placed(["a"], known=False))
    assert "sharded over all 2 workers (auto: all are on one node)" in said(config, None)


def test_a_cpu_has_no_memory_of_its_own() -> None:
    from raysft.train.replicas import device_bytes

    assert device_bytes(torch.device("cpu")) is None
