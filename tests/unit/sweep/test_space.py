"""The space of a sweep: what it takes, what it refuses, and which points it gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.config import Config, load_config
from raysft.driver import sweep as swept
from raysft.errors import UserError
from raysft.sweep.choose import Listed, Optuna
from raysft.sweep.space import check_size, points, read_space
from tests.support.models import CAUSAL

Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    data = tmp_path / "train.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')

    def made(space: dict[str, Any], **sweep: Any) -> Config:
        tree = {
            "run": {"storage_path": str(tmp_path / "runs")},
            "data": {"train": [str(data)], "eval": [str(data)], "tokens_per_batch": 64},
            "model": CAUSAL,
            "peft": {"method": "lora"},
            "sweep": {"space": space, **sweep},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_config(path)

    return made


def all_points(config: Config) -> list[dict[str, Any]]:
    dimensions = read_space(config)
    check_size(config.sweep, dimensions)
    return list(points(config.sweep, dimensions, config.run.seed))


def test_a_grid_is_every_combination_once(make: Make) -> None:
    found = all_points(make({"peft.r": [8, 16, 32], "optim.lr": [1e-4, 1e-3]}))
    assert len(found) == 6
    assert {(point["peft.r"], point["optim.lr"]) for point in found} == {
        (r, lr) for r in (8, 16, 32) for lr in (1e-4, 1e-3)
    }


def test_random_points_are_those_of_the_seed_and_more_of_them_begin_alike(make: Make) -> None:
    space = {"optim.lr": {"loguniform": [1e-5, 1e-3]}, "peft.r": {"randint": [1, 64]}}
    few, many = (all_points(make(space, trials=n)) for n in (5, 200))
    assert many[:5] == few
    logs = sorted(math.log10(point["optim.lr"]) for point in many)
    assert -5 <= logs[0] < -4.9 and -3.1 < logs[-1] <= -3
    assert abs(logs[100] + 4) < 0.2, "the logarithm is even, not the rate"
    ranks = {point["peft.r"] for point in many}
    assert min(ranks) == 1 and max(ranks) == 64, "both ends are included"


def test_draws_from_lists_are_never_the_same_twice(make: Make) -> None:
    found = all_points(make({"peft.r": [8, 16, 32], "optim.lr": [1e-4, 1e-3]}, trials=6))
    assert len({tuple(point.values()) for point in found}) == 6


def test_keys_with_grid_meet_every_drawn_point(make: Make) -> None:
    space = {"peft.r": {"grid": [8, 16]}, "optim.lr": {"uniform": [1e-4, 1e-3]}}
    found = all_points(make(space, trials=3))
    assert [point["peft.r"] for point in found] == [8, 16] * 3
    assert len({point["optim.lr"] for point in found}) == 3


@pytest.mark.parametrize(
    ("space", "sweep", "said"),
    [
        ({}, {}, "sweep.space: is empty"),
        ({"optim.lrr": [1e-3]}, {}, "optim.lrr: unknown key; did you mean optim.lr?"),
        ({"optim.lr": [1e-3, -1]}, {}, "optim.lr: expected a number greater than 0, found -1"),
        ({"optim.lr": {"logunifrom": [1, 2]}}, {}, "did you mean loguniform?"),
        ({"optim.lr": {"uniform": [2, 1]}}, {}, "low below high"),
        ({"optim.lr": {"loguniform": [0, 1]}}, {}, "numbers above 0"),
        ({"peft.r": {"randint": [1.5, 3]}}, {}, "whole numbers"),
        ({"peft.r": [8, 8]}, {}, "8 is named twice"),
        ({"peft.r": 8}, {}, "a list of values"),
        ({"run.seed": [1, 2]}, {}, "sweep.seeds varies run.seed"),
        ({"evaluate.normalize": [[]]}, {}, "could not be compared"),
        ({"optim.lr": {"uniform": [1e-4, 1]}}, {}, "sweep.trials: say how many"),
        ({"optim.lr": {"uniform": [1e-4, 1]}}, {"searcher": "grid"}, "has no list of values"),
        ({"peft.r": [8, 16]}, {"searcher": "grid", "trials": 3}, "the grid has 2 points"),
        ({"peft.r": [8, 16]}, {"trials": 3}, "only 2 different points"),
        ({"peft.r": [8, 16]}, {"scheduler": "asha"}, "set evaluate.every"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_starts(
    space: dict[str, Any], sweep: dict[str, Any], said: str, make: Make
) -> None:
    with pytest.raises(UserError, match="sweep") as refused:
        swept.check(make(space, **sweep))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_optuna_goes_on_from_what_earlier_starts_have_found(make: Make) -> None:
    """The next point depends on all that was told, not on which process told it."""
    pytest.importorskip("optuna")
    dimensions = read_space(make({"optim.lr": {"loguniform": [1e-5, 1e-1]}, "peft.r": [8, 16]}))

    def worth(point: dict[str, Any]) -> float:
        return abs(math.log10(point["optim.lr"]) + 3) + (point["peft.r"] == 8)

    first = Optuna(dimensions, 40, "min", 0)
    tried = []
    for number in range(25):
        point = first.next()
        assert point is not None
        tried.append(point)
        first.tell(number, worth(point))
    again = Optuna(dimensions, 40, "min", 0)
    for number, point in enumerate(tried):
        again.begun(point)
        again.tell(number, worth(point))
    rest = []
    for number in range(25, 40):
        point = again.next()
        assert point is not None
        rest.append(point)
        again.tell(number, worth(point))
    assert again.next() is None
    late = sum(map(worth, rest)) / len(rest)
    assert late < sum(map(worth, tried[:10])) / 10, "it has learnt from the first start"


def test_a_list_goes_on_behind_what_was_begun() -> None:
    chosen = Listed([{"a": number} for number in range(3)])
    chosen.begun({"a": 0})
    assert [chosen.next(), chosen.next(), chosen.next()] == [{"a": 1}, {"a": 2}, None]
