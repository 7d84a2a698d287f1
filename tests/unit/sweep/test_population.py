"""Population based training: who takes over from whom, and what a run is that has taken over."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raysft.audit import audit
from raysft.config import Config
from raysft.driver.population import Generations
from raysft.driver.sweep import check
from raysft.errors import UserError
from raysft.run.catalogue import Catalogue, Saved
from raysft.run.evaluations import Evaluations
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from raysft.sweep import table
from raysft.sweep.folder import SweepFolder, Trial, open_sweep, trial_tree
from raysft.sweep.population import NAME, Population, Stretch, Takeover, changed, decide, lineage
from raysft.sweep.space import Dimension, read_space
from raysft.train.loop import train
from tests.support.worlds import die_at, fork, start, tiny
from tests.unit.train.test_checkpoint import ONE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
RATE = Dimension("optim.lr", "loguniform", low=1e-5, high=1e-1)
STEPS, AT = 6, 2
METRIC = "loss/asr"
RATES = [1e-7, 2e-7, 3e-3, 1e-2]


# --- the decision ---------------------------------------------------------------------------


def decided(values: dict[int, float], quantile: float, **changes: Any) -> list[Takeover]:
    current = {number: {"optim.lr": 10.0 ** -(2 + number % 3)} for number in values}
    settings = {"step": 4, "mode": "min", "seed": 3, **changes}
    return decide([RATE], values, current, quantile=quantile, **settings)


@pytest.mark.parametrize(
    ("trials", "quantile", "count"),
    [(4, 0.25, 1), (4, 0.5, 2), (5, 0.25, 2), (5, 0.5, 2), (2, 0.25, 1), (3, 0.5, 1), (8, 0.25, 2)],
)
def test_the_worst_take_over_from_as_many_best(trials: int, quantile: float, count: int) -> None:
    values = {number: float((7 * number) % trials) for number in range(trials)}
    order = sorted(values, key=lambda number: values[number])
    for mode, ranked in (("min", order), ("max", order[::-1])):
        found = decided(values, quantile, mode=mode)
        assert {one.trial for one in found} == set(ranked[trials - count :])
        assert {one.donor for one in found} <= set(ranked[:count])
        assert all(one.step == 4 for one in found)


def test_who_has_no_number_is_the_worst_and_who_is_as_good_as_its_donor_stays() -> None:
    assert [one.trial for one in decided({0: 1.0, 1: 1e30, 2: 0.5, 3: 2.0}, 0.25)] == [1]
    assert decided({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, 0.5) == []
    assert decided({0: 1.0}, 0.5) == decided({}, 0.5) == []


def test_a_decision_is_a_function_of_seed_step_and_values() -> None:
    values = {number: float(number) for number in range(20)}
    found = decided(values, 0.5)
    assert found == decided(dict(reversed(values.items())), 0.5)
    assert len({one.donor for one in found}) > 3, "from one of the best, not from the best alone"
    assert found != decided(values, 0.5, seed=4) and found != decided(values, 0.5, step=6)
    donors = {one.trial: one for one in found}
    factors = {
        round(one.point["optim.lr"] / 10.0 ** -(2 + one.donor % 3), 3)  # type: ignore[operator]
        for one in donors.values()
    }
    assert {0.8, 1.2} <= factors


def drawn(dimension: Dimension, value: Any, count: int = 400) -> list[Any]:
    return [changed(dimension, value, np.random.default_rng([9, n])) for n in range(count)]


def test_ranges_change_by_a_fifth_within_their_bounds() -> None:
    found = drawn(RATE, 1e-3)
    near = [value for value in found if value in (8e-4, 1.2e-3)]
    assert set(near) == {8e-4, 1.2e-3}
    assert 0.65 < len(near) / len(found) < 0.85, "a quarter is drawn anew"
    assert all(RATE.low <= value <= RATE.high for value in found)
    assert max(drawn(RATE, 9e-2)) == RATE.high and min(drawn(RATE, 1.1e-5)) == RATE.low
    even = Dimension("peft.dropout", "uniform", low=0.0, high=0.5)
    assert {0.08, 0.12} <= set(drawn(even, 0.1)) and set(drawn(even, 0.0)) != {0.0}


def test_whole_numbers_stay_whole_and_move() -> None:
    whole = Dimension("optim.clip", "randint", low=1, high=10)
    assert all(isinstance(value, int) and 1 <= value <= 10 for value in drawn(whole, 2))
    counts = {value: drawn(whole, 2).count(value) for value in (1, 2, 3)}
    assert min(counts[1], counts[3]) > 100 > counts[2]
    assert drawn(whole, 5).count(4) > 100 and drawn(whole, 5).count(6) > 100
    assert drawn(whole, 10).count(10) > 100, "its bound"


def test_lists_move_to_a_neighbour() -> None:
    clips = Dimension("optim.clip", "choice", values=(0.1, 0.5, 1.0, 5.0, 10.0))
    counts = {value: drawn(clips, 1.0).count(value) for value in clips.values}
    assert min(counts[0.5], counts[5.0]) > 100 > max(counts[0.1], counts[1.0], counts[10.0])
    assert drawn(clips, 0.1).count(0.5) > 250 and drawn(clips, 10.0).count(5.0) > 250
    assert set(drawn(Dimension("optim.clip", "choice", values=(1.0,)), 1.0)) == {1.0}


# --- what can be asked for ------------------------------------------------------------------


def sweep_config(folder: Path, **changes: Any) -> Config:
    """Of a sweep over four rates."""
    settings: dict[str, Any] = {
        "train__max_steps": STEPS,
        "evaluate__every": AT,
        "evaluate__generate": False,
        "evaluate__max_examples": 4,
        "data__eval": [{"path": str(folder / "units.json"), "name": "dev"}],
        "checkpoint__every": 0,
        "checkpoint__keep": 9,
        "sweep__space": {"optim.lr": RATES},
        "sweep__metric": "loss",
        "sweep__scheduler": "pbt",
        "sweep__quantile": 0.5,
        **changes,
    }
    return tiny(folder, "sweep", **settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sweep__space": {"peft.r": [4, 8]}, "peft__method": "lora"},
            r"sweep\.space\.peft\.r: .*pbt.* may vary: peft\.dropout, optim\.lr, ",
        ),
        ({"sweep__space": {"data.lanes": [2, 4]}}, r"sweep\.space\.data\.lanes: "),
        ({"sweep__space": {"data.prefetch": [2, 4]}}, r"sweep\.space\.data\.prefetch: "),
        ({"sweep__seeds": 2}, r"sweep\.seeds: 2"),
        ({"sweep__searcher": "optuna", "sweep__trials": 4}, r"sweep\.searcher: optuna"),
        ({"sweep__space": {"optim.lr": [1e-3]}}, r"sweep\.trials: .* at least 2"),
        ({"sweep__interval": 3}, r"sweep\.interval: 3 is no multiple of evaluate\.every: 2"),
        ({"evaluate__every": 0}, r"sweep\.scheduler: pbt compares .* evaluate\.every"),
        ({"checkpoint__resume": "never"}, r"checkpoint\.resume: never"),
    ],
)
def test_what_a_population_cannot_do_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        check(sweep_config(tmp_path, **changes))


def test_keys_of_the_steps_that_follow_may_vary(tmp_path: Path) -> None:
    space = {
        "optim.lr": {"loguniform": [1e-5, 1e-2]},
        "optim.betas": [[0.9, 0.95], [0.9, 0.99]],
        "optim.clip": {"uniform": [0.1, 2.0]},
        "train.task_weights.asr": [0.5, 1.0],
        "peft.dropout": [0.0, 0.1],
    }
    config = sweep_config(tmp_path, sweep__space=space, sweep__trials=8, peft__method="lora")
    assert len(check(config)) == 5


def test_another_interval_is_another_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "sweep"
    open_sweep(sweep_config(tmp_path), folder)
    open_sweep(sweep_config(tmp_path, sweep__interval=AT), folder)  # what it was by default
    for other in ({"sweep__interval": 4}, {"evaluate__every": 1}):
        with pytest.raises(UserError, match=r"holds another sweep: .*sweep\.interval"):
            open_sweep(sweep_config(tmp_path, **other), folder)


# --- a run that has taken over --------------------------------------------------------------


def trained(config: Config, sweep: SweepFolder, trial: Trial, until: int) -> Path:
    """The trial's run, trained to that step in this process (0: to its end)."""
    from raysft.sweep.space import point_config

    tree = trial_tree(config, sweep, trial)
    tree["data"]["index_path"] = config.data.index_path
    job = start(point_config(tree, Population(sweep).point(trial), trial.name), ONE)
    job.until = until
    assert train(job) == until or STEPS
    return sweep.run(trial)


def begun(tmp_path: Path, **changes: Any) -> tuple[Config, SweepFolder]:
    """A sweep whose four trials have come to their first comparison."""
    config = sweep_config(tmp_path, **changes)
    sweep = open_sweep(config, tmp_path / "runs" / "sweep")
    for number, rate in enumerate(RATES):
        trial = Trial(number, {"optim.lr": rate}, number, config.run.seed)
        sweep.add(trial)
        trained(config, sweep, trial, AT)
        sweep.set_state(trial, status="waiting", attempts=1)
    return config, sweep


def losses(run: Path) -> dict[int, Any]:
    return {line["step"]: line["loss"] for line in read_lines(run / "metrics.jsonl")}


TAKEN = Takeover(AT, 0, 3, {"optim.lr": 8e-3})
VALUES = {0: 4.0, 1: 3.9, 2: 3.0, 3: 2.5}


@pytest.mark.parametrize("beside", [False, True])
def test_a_run_ends_at_the_step_it_is_to_and_saves_it(beside: bool, tmp_path: Path) -> None:
    config, sweep = begun(tmp_path, evaluate__beside=beside)
    run = sweep.run(sweep.trial(2))
    assert list(losses(run)) == [1, 2]
    assert [saved.step for saved in Catalogue.of(config.checkpoint, run).committed()] == [AT]
    (line,) = read_lines(run / "eval.jsonl")
    assert (line["step"], line["final"], line["checkpoint"]) == (AT, False, True)
    assert sweep.reached(sweep.trial(2), AT) and not sweep.reached(sweep.trial(2), AT + 1)
    assert "stopped" in [line["event"] for line in read_lines(run / "events.jsonl")]
    whole = trained(config, sweep, sweep.trial(2), 0)
    other = Trial(9, {"optim.lr": RATES[2]}, 9, config.run.seed)
    sweep.add(other)
    assert losses(whole) == losses(trained(config, sweep, other, 0)), "as if it had gone through"


@pytest.mark.parametrize("place", [None, "objects"])
def test_who_takes_over_goes_on_as_the_other_would_have_with_its_values(
    place: str | None, tmp_path: Path
) -> None:
    path = None if place is None else f"objects://{tmp_path}/bucket"
    config, sweep = begun(tmp_path, checkpoint__path=path, checkpoint__best=METRIC)
    first, donor = sweep.trial(0), sweep.trial(3)
    alone = Trial(9, TAKEN.point, 9, config.run.seed)
    if path is None:  # the donor's own run, with the new rate
        sweep.add(alone)
        shutil.copytree(sweep.run(donor), sweep.run(alone))
        tree = yaml.safe_load((sweep.run(alone) / "config.yaml").read_text())
        tree["optim"]["lr"] = TAKEN.point["optim.lr"]
        (sweep.run(alone) / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    population = Population(sweep)
    population.write(AT, VALUES, [TAKEN])
    said: list[str] = []
    population.settle(said.append)
    assert said == [f"step {AT}: trial {first.name} goes on from {donor.name} with optim.lr 0.008"]
    before = losses(sweep.run(first))
    run = trained(config, sweep, first, 0)
    assert audit(run, sample=4).clean
    found = losses(run)
    assert list(found) == list(range(1, STEPS + 1))
    assert {step: found[step] for step in before} == before, "what was, stays"
    if path is None:
        assert audit(sweep.run(donor)).clean
        expected = losses(trained(config, sweep, alone, 0))
        assert [found[step] for step in range(AT + 1, STEPS + 1)] == [
            expected[step] for step in range(AT + 1, STEPS + 1)
        ]
        assert found[AT] != expected[AT]
    theirs = next(item for item in Evaluations.load(sweep.run(donor)).items if item.step == AT)
    ours = [item for item in Evaluations.load(run).items if item.step == AT]
    assert ours == [theirs], "the figures of its checkpoint"
    assert read_config(run).optim.lr == TAKEN.point["optim.lr"]
    events = [x for x in read_lines(run / "events.jsonl") if x["event"] == "taken_over"]
    assert [(x["step"], x["from"], x["point"]) for x in events] == [(AT, donor.name, TAKEN.point)]


def content(run: Path) -> dict[str, Any]:
    """What a run goes on from: its newest checkpoint, its figures, events and config."""
    saved, skipped = Catalogue.of(read_config(run).checkpoint, run).newest(Saved.damage)
    assert saved is not None and not skipped
    return {
        "meta": saved.meta(),
        "steps": [one.step for one in Catalogue.of(read_config(run).checkpoint, run).committed()],
        "figures": [dataclasses.asdict(item) for item in Evaluations.load(run).items],
        "events": [
            {**line, "time": 0.0}
            for line in read_lines(run / "events.jsonl")
            if line["event"] == "taken_over"
        ],
        "config": (run / "config.yaml").read_text(),
    }


def settled(folder: Path, dies_at: int) -> None:
    die_at(dies_at)
    Population(SweepFolder(folder)).settle(lambda text: None)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_any_moment_it_is_done_again_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of each change of a file or a name that a takeover makes."""
    monkeypatch.setattr("raysft.run.ownership.SETTLE_S", 0.1)  # there are no workers to wait for
    _, sweep = begun(tmp_path)
    Population(sweep).write(AT, VALUES, [TAKEN])
    aside = tmp_path / "aside"
    shutil.copytree(sweep.path, aside)
    Population(sweep).settle(lambda text: None)
    run = sweep.run(sweep.trial(0))
    wanted, lines = content(run), read_lines(sweep.path / NAME)
    killed, number = 0, 1
    while True:
        shutil.rmtree(sweep.path)
        shutil.copytree(aside, sweep.path)
        process = fork(settled, sweep.path, number)
        process.join(60)
        assert process.exitcode in (0, -9)
        if process.exitcode == 0:
            break
        killed += 1
        Population(sweep).settle(lambda text: None)
        assert content(run) == wanted, f"killed at its {number}th change"
        assert read_lines(sweep.path / NAME) == lines
        number += 1
    assert killed > 20
    before = copy.deepcopy(content(run))
    Population(sweep).settle(lambda text: None)
    assert content(run) == before and read_lines(sweep.path / NAME) == lines


# --- generations ----------------------------------------------------------------------------


def told(search: Generations, trial_id: str, step: int, figure: float, **more: Any) -> None:
    search.on_trial_complete(trial_id, {"step": step, "figure": figure, "done": True}, **more)


def generations(
    config: Config, sweep: SweepFolder, say: Callable[..., None] = print
) -> Generations:
    return Generations(config, sweep, read_space(config), "min", STEPS, say)


def test_all_come_to_a_comparison_before_any_goes_on(tmp_path: Path) -> None:
    config, sweep = begun(tmp_path)
    search = generations(config, sweep)
    given = [search.suggest(name) for name in "abcd"]
    assert [(one["number"], one["until"]) for one in given] == [(n, AT) for n in range(4)]  # type: ignore[index,call-overload]
    assert search.suggest("e") is None, "the others are waited for"
    for name, figure in zip("acd", (4.0, 3.0, 2.5)):
        told(search, name, AT, figure)
        assert search.suggest("e") is None
    search.on_trial_complete("b", None, error=True)
    (one,) = Population(sweep).takeovers()
    assert (one.trial, one.donor) == (0, 3), "one of three; the one that failed is left out"
    again = [search.suggest(name) for name in "efg"]
    assert sorted(given["number"] for given in again) == [0, 2, 3]  # type: ignore[index,call-overload]
    assert {given["until"] for given in again} == {2 * AT}  # type: ignore[index,call-overload]
    assert next(g for g in again if g["number"] == 0)["optim.lr"] == one.point["optim.lr"]  # type: ignore[index,call-overload]


def waiting(tmp_path: Path) -> tuple[Config, SweepFolder]:
    """A sweep that has nothing but its config: where nobody takes over, no run is looked at."""
    config = sweep_config(tmp_path)
    return config, open_sweep(config, tmp_path / "runs" / "sweep")


def test_an_interrupted_sweep_decides_nothing_and_goes_on_where_it_was(tmp_path: Path) -> None:
    config, sweep = waiting(tmp_path)
    search = generations(config, sweep)
    for name in "abcd":
        search.suggest(name)
    for name, figure in zip("abc", (3.0, 3.0, 3.0)):
        told(search, name, AT, figure)
    sweep.stopping.touch()
    told(search, "d", 1, 2.5)
    assert search.suggest("e") == Generations.FINISHED and not (sweep.path / NAME).exists()
    sweep.stopping.unlink()
    search = generations(config, sweep)
    for name in "abcd":
        search.suggest(name)
    for name, figure in zip("abcd", (3.0, 3.0, 3.0, 3.0)):
        told(search, name, AT, figure)
    lines = read_lines(sweep.path / NAME)
    assert [line["step"] for line in lines] == [AT, AT] and lines[1]["done"]
    search = generations(config, sweep)  # killed, and started again
    given = [search.suggest(name) for name in "abcd"]
    assert {one["until"] for one in given} == {2 * AT}  # type: ignore[index,call-overload]
    assert read_lines(sweep.path / NAME) == lines


def test_the_last_part_ends_with_the_run(tmp_path: Path) -> None:
    config, sweep = waiting(tmp_path)
    Population(sweep).write(STEPS - AT, VALUES, [])
    search = generations(config, sweep)
    given = [search.suggest(name) for name in "abcd"]
    assert {one["until"] for one in given} == {0}  # type: ignore[index,call-overload]
    assert search.suggest("e") is None
    for name in "abcd":
        told(search, name, STEPS, 1.0)
    assert search.suggest("e") == Generations.FINISHED


def test_trials_that_would_never_be_compared_are_refused(tmp_path: Path) -> None:
    config = sweep_config(tmp_path, sweep__interval=STEPS)
    sweep = open_sweep(config, tmp_path / "runs" / "sweep")
    with pytest.raises(UserError, match=r"^sweep\.interval: 6, but a trial has 6 steps"):
        generations(config, sweep)


# --- the table ------------------------------------------------------------------------------


def test_the_lineage_of_a_trial_goes_through_those_it_took_over_from() -> None:
    trials = [Trial(n, {"optim.lr": float(n)}, n, 0) for n in range(4)]
    taken = [
        Takeover(2, 0, 3, {"optim.lr": 3.6}),
        Takeover(4, 1, 0, {"optim.lr": 4.3}),
        Takeover(6, 0, 2, {"optim.lr": 2.4}),
        Takeover(6, 1, 2, {"optim.lr": 1.6}),
        Takeover(8, 1, 3, {"optim.lr": 2.4}),
    ]
    of_one = [Stretch(0, 3, {"optim.lr": 3.0}), Stretch(2, 0, {"optim.lr": 3.6})]
    assert lineage(trials, taken[:2], 1) == [*of_one, Stretch(4, 1, {"optim.lr": 4.3})]
    assert lineage(trials, taken, 2) == [Stretch(0, 2, {"optim.lr": 2.0})]
    last = [Stretch(0, 3, {"optim.lr": 3.0}), Stretch(8, 1, {"optim.lr": 2.4})]
    assert lineage(trials, taken, 1) == last


def test_table_and_best_say_who_took_over_when_and_with_what(tmp_path: Path) -> None:
    config, sweep = begun(tmp_path)
    Population(sweep).write(AT, VALUES, [TAKEN])
    Population(sweep).settle(lambda text: None)
    first = sweep.trial(0)
    for number in (0, 3):
        trained(config, sweep, sweep.trial(number), 0)
        sweep.set_state(sweep.trial(number), status="finished")
    found = table.rows(sweep, METRIC, "min")
    table.write_csv(tmp_path / "results.csv", found, METRIC)
    with open(tmp_path / "results.csv", newline="") as lines:
        rows = {row["trial"]: row for row in csv.DictReader(lines)}
    donor = sweep.trial(3)
    assert rows[first.name]["optim.lr"] == "0.008"
    assert rows[first.name]["taken_over"] == f"step {AT} from {donor.name}"
    assert rows[donor.name]["taken_over"] == "" and rows[donor.name]["optim.lr"] == "0.01"
    row = next(row for row in found if row.trial == first)
    table.write_best(tmp_path / "best.yaml", config, sweep, row)
    text = (tmp_path / "best.yaml").read_text()
    assert yaml.safe_load(text)["optim"]["lr"] == 0.008
    assert f"# steps 1 to {AT}: optim.lr: 0.01 ({donor.name})\n" in text
    assert f"# steps {AT + 1} to {STEPS}: optim.lr: 0.008 ({first.name})\n" in text
    plain = next(row for row in found if row.trial == donor)
    table.write_best(tmp_path / "best.yaml", config, sweep, plain)
    assert "# steps" not in (tmp_path / "best.yaml").read_text()
    assert math.isfinite(json.loads(json.dumps(plain.value)))
