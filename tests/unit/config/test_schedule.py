"""A run may be made longer: by itself where rates so far would be the same, else on demand."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from raysft.config import Config
from raysft.config.schedule import another_length, rate
from raysft.config.schema import Optim
from raysft.errors import UserError
from raysft.parallel import World
from raysft.run.folder import open_run
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.properties.test_world_sizes import ledger
from tests.support.worlds import start, tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ONE = World.current()


def asked(step: int, before: int | None, now: int, **optim: Any) -> str | None:
    config = Config.model_validate({"optim": optim})
    return another_length(config, step, before, now, [before, None])


@pytest.mark.parametrize(
    ("step", "before", "now", "optim"),
    [
        (20, 20, 30, {"schedule": "constant"}),
        (20, 20, 30, {"schedule": "constant", "warmup": 5}),
        (9, 20, 10, {"schedule": "constant"}),
        (8, 20, 30, {"schedule": "wsd", "decay": 10, "warmup": 2}),  # still before its decay
        (5, 20, 30, {"schedule": "cosine", "warmup": 5}),  # still warming up
        (6, 20, 30, {"schedule": "linear", "warmup": 5}),  # at the peak
    ],
)
def test_goes_on_by_itself_where_rates_so_far_are_the_same(
    step: int, before: int, now: int, optim: dict[str, Any]
) -> None:
    said = asked(step, before, now, **optim)
    assert said is not None and f"has {now} steps now, and had {before}: goes on" in said


@pytest.mark.parametrize(
    ("step", "before", "now", "optim"),
    [
        (20, 20, 30, {"schedule": "cosine"}),
        (7, 20, 30, {"schedule": "linear", "warmup": 5}),
        (20, 20, 30, {"schedule": "wsd", "decay": 10}),
        (12, 20, 30, {"schedule": "wsd", "decay": 0.5}),
        (3, 20, 30, {"schedule": "constant", "warmup": 0.3}),  # a share of all steps
        (12, 20, 14, {"schedule": "wsd", "decay": 5}),  # shorter: would be decaying by now
    ],
)
def test_is_refused_where_rates_so_far_would_be_others_unless_told_to(
    step: int, before: int, now: int, optim: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"optim.reschedule=true to go on with the rates of a run"):
        asked(step, before, now, **optim)
    said = asked(step, before, now, **optim, reschedule=True)
    assert said is not None
    after = rate(Optim(**optim), step + 1, now)
    assert f"{after:.3g} in step {step + 1})" in said


@pytest.mark.parametrize("now", [10, 12])
def test_a_run_made_shorter_than_what_is_done_has_nothing_left(now: int) -> None:
    said = asked(12, 20, now, schedule="constant")
    assert said is not None and said.endswith("nothing is left to train, 12 steps are done")
    with pytest.raises(UserError, match=r"optim.reschedule=true to leave it at the steps that are"):
        asked(12, 20, now, schedule="cosine")
    said = asked(12, 20, now, schedule="cosine", reschedule=True)
    assert said is not None and said.endswith("nothing is left to train, 12 steps are done")


def test_other_data_and_the_same_config_go_on_with_the_rates_of_the_new_length() -> None:
    for optim in ({"schedule": "cosine"}, {"schedule": "constant", "warmup": 0.5}):
        config = Config.model_validate({"optim": optim, "train": {"epochs": 3}})
        was = [config.train.max_steps, 3]
        said = another_length(config, 5, 20, 30, was)
        assert said is not None and "had 20, for data.extend has taken in other data: " in said
        assert f"{rate(Optim(**optim), 6, 30):.3g} in step 6)" in said
        with pytest.raises(UserError, match=r"optim.reschedule=true"):  # the epochs were edited
            another_length(config, 5, 20, 30, [config.train.max_steps, 2])
        with pytest.raises(UserError, match=r"optim.reschedule=true"):  # nothing is known of them
            another_length(config, 5, 20, 30, None)
    config = Config.model_validate({"peft": {"method": "adalora"}, "train": {"epochs": 3}})
    with pytest.raises(
        UserError, match=r"^data.extend: this run has 30 .* adalora .* Put the data"
    ):
        another_length(config, 5, 20, 30, [config.train.max_steps, 3])


def test_nothing_is_said_where_nothing_changes_or_nothing_is_known() -> None:
    for step, before, now in ((20, 20, 20), (0, 20, 30), (20, None, 30)):
        assert asked(step, before, now, schedule="cosine") is None


# -- runs ----------------------------------------------------------------------------------------


def lines(folder: Path, name: str = "run") -> list[dict[str, Any]]:
    found = read_lines(folder / "runs" / name / "metrics.jsonl")
    return [{key: line[key] for key in ("step", "loss", "lr")} for line in found]


class Stopped(Exception):
    """In place of a kill."""


def stop_after_5(line: dict[str, Any]) -> None:
    if line.get("step") == 5 and "loss" in line:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
        raise Stopped


COSINE = {"optim__schedule": "cosine", "optim__warmup": 2}
WSD = {"optim__schedule": "wsd", "optim__decay": 4, "optim__warmup": 2}


def test_a_run_under_way_is_made_longer_as_if_it_had_begun_so(tmp_path: Path) -> None:
    """wsd: until its decay begins, the end may be moved as often as one likes."""
    with pytest.raises(Stopped):
        train(start(tiny(tmp_path, train__max_steps=9, **WSD), ONE, stop_after_5))
    train(start(tiny(tmp_path, train__max_steps=12, **WSD), ONE))
    train(start(tiny(tmp_path, "whole", train__max_steps=12, **WSD), ONE))
    assert lines(tmp_path) == lines(tmp_path, "whole")


def test_a_finished_cosine_goes_on_with_the_rates_of_the_longer_one(tmp_path: Path) -> None:
    train(start(tiny(tmp_path, train__max_steps=6, **COSINE), ONE))
    before = lines(tmp_path)
    longer = {"train__max_steps": 10, **COSINE}
    with pytest.raises(UserError, match=r"had 6; with optim.schedule: cosine and optim.warmup: 2"):
        train(start(tiny(tmp_path, **longer), ONE))
    assert lines(tmp_path) == before
    train(start(tiny(tmp_path, **longer, optim__reschedule=True), ONE))
    optim, found = tiny(tmp_path, **longer).optim, lines(tmp_path)
    assert found[:6] == before
    wanted = [optim.lr * rate(optim, step, 10) for step in range(7, 11)]
    assert [line["lr"] for line in found[6:]] == pytest.approx(wanted)
    event = next(
        e for e in read_lines(tmp_path / "runs/run/events.jsonl") if e["event"] == "length"
    )
    assert (event["step"], event["total_steps"]) == (6, 10)
    # The steps are those of a run that was as long from the beginning, and once it has gone on
    # with the new length, no key is needed.
    train(start(tiny(tmp_path, "whole", **longer), ONE))
    assert ledger(tmp_path / "runs" / "run") == ledger(tmp_path / "runs" / "whole")
    assert train(start(tiny(tmp_path, **longer), ONE)) == 10


def test_more_epochs_are_a_greater_length(tmp_path: Path) -> None:
    changes = {"train__max_steps": None, "checkpoint__every": 0}
    one = start(tiny(tmp_path, train__epochs=1, **changes), ONE)
    steps = train(one)
    two = start(tiny(tmp_path, train__epochs=2, **changes), ONE)
    assert train(two) == two.total_steps > steps
    kept = {"train__max_steps": None, **COSINE, "checkpoint__every": 0}
    train(start(tiny(tmp_path, "cosine", train__epochs=1, **kept), ONE))
    with pytest.raises(UserError, match=rf"has {two.total_steps} steps now, and had {steps}"):
        train(start(tiny(tmp_path, "cosine", train__epochs=2, **kept), ONE))


def test_a_cosine_takes_in_new_data_with_the_rates_of_the_greater_length(tmp_path: Path) -> None:
    kept = {"train__max_steps": None, "train__epochs": 2, **COSINE, "data__extend": True}
    kept["checkpoint__every"] = 4
    first = start(tiny(tmp_path, **kept), ONE, stop_after_5)
    with pytest.raises(Stopped):
        train(first)
    before = lines(tmp_path)
    more = tmp_path / "more.json"
    more.write_text(
        json.dumps([{"id": f"n{i}", "input": "[Hu3]" * 5, "output": f"n {i}"} for i in range(40)])
    )
    grown = tiny(tmp_path, **kept).model_dump(mode="json")
    grown["data"]["train"].append({"path": str(more)})
    config = Config.model_validate(grown)
    job = start(config, ONE)
    assert train(job) == job.total_steps > first.total_steps
    found = lines(tmp_path)
    assert found[:4] == before[:4]
    wanted = [config.optim.lr * rate(config.optim, s, job.total_steps) for s in range(5, 8)]
    assert [line["lr"] for line in found[4:7]] == pytest.approx(wanted)
    said = [e for e in read_lines(tmp_path / "runs/run/events.jsonl") if e["event"] == "length"]
    assert [(e["step"], e["total_steps"]) for e in said] == [(4, job.total_steps)]
    assert "data.extend has taken in other data" in said[0]["reason"]
    # Epochs edited on top of it are refused as ever.
    with pytest.raises(UserError, match=r"^train.max_steps, train.epochs: this run has"):
        grown["train"]["epochs"] = 3
        train(start(Config.model_validate(grown), ONE))


def test_a_checkpoint_that_does_not_know_its_length_is_not_lengthened_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a run that an older raysft began."""
    train(start(tiny(tmp_path, train__max_steps=4, **COSINE), ONE))
    from raysft.run.catalogue import Saved

    known = Saved.meta
    monkeypatch.setattr(
        Saved, "meta", lambda self: {k: v for k, v in known(self).items() if k != "total_steps"}
    )
    open_run(tiny(tmp_path, train__max_steps=4, **COSINE))
    with pytest.raises(UserError, match=r"train.max_steps \(was 4, now 6\)"):
        open_run(tiny(tmp_path, train__max_steps=6, **COSINE))
