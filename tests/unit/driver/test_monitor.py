"""The failure budget, signals and reasons of a submission; and what its user is shown of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest

from raysft.driver.monitor import LONGEST_BACKOFF_S, Monitor
from raysft.progress import ProgressLine
from raysft.run.evaluations import Evaluation, Made
from raysft.run.signals import LEAVE, SAVE


def fail(monitor: Monitor, reason: str = "worker 1: died", workers: int = 2) -> dict[str, Any]:
    """A worker fails and a new group begins: what it is told."""
    monitor.failed(reason)
    return monitor.begin(workers)


def begun(max_failures: int = 3, backoff_s: float = 2.0) -> Monitor:
    monitor = Monitor(max_failures, backoff_s)
    assert monitor.begin(2) == {}
    return monitor


def saved(step: int) -> dict[str, Any]:
    return {"event": "saved", "step": step}


def test_only_failures_without_a_new_checkpoint_in_between_count() -> None:
    monitor = begun(max_failures=2)
    for step in range(10, 100, 10):
        assert fail(monitor)["failures"] == 1
        assert fail(monitor)["failures"] == 2
        monitor.report(saved(step))
    monitor.report(saved(20))  # no new one
    assert fail(monitor)["failures"] == 1
    assert fail(monitor)["failures"] == 2
    assert monitor.ended() is None
    end = fail(monitor, "worker 0: out of memory")["end"]
    assert end == monitor.ended()
    assert end == (
        "training failed 3 times since the checkpoint of step 90, and parallel.max_failures=2; "
        "the last time: worker 0: out of memory; the same command continues from the last "
        "checkpoint"
    )


def test_the_end_promises_no_more_than_the_same_command_does() -> None:
    end = fail(ended_at_once(saved=-1))["end"]
    assert end.endswith("the same command begins again at step 1, for no checkpoint was written")
    end = fail(ended_at_once(saved=40))["end"]
    assert "failed 1 times so far" in end
    assert end.endswith("the same command continues from the last checkpoint")


def test_an_evaluation_that_fails_is_not_called_training() -> None:
    monitor = Monitor(0, 0.0, 40, training=False)
    monitor.begin(1)
    end = fail(monitor, workers=1)["end"]
    assert end.startswith("evaluation failed 1 times") and end.endswith("command evaluates anew")


def ended_at_once(saved: int) -> Monitor:
    monitor = Monitor(0, 0.0, saved)
    monitor.begin(2)
    return monitor


def test_a_failure_that_may_be_certain_is_when_it_comes_again_without_a_checkpoint() -> None:
    monitor = begun(max_failures=-1)
    name = "RuntimeError in raysft/train/step.py, line 9, in forward"
    assert not monitor.again(name)
    assert not monitor.again(name), "the other worker of the same group"
    fail(monitor)
    assert not monitor.again("RuntimeError elsewhere")
    assert monitor.again(name)
    monitor.report(saved(10))
    fail(monitor)
    assert not monitor.again(name)


def test_a_mistake_while_a_group_is_taken_down_may_only_follow_from_that() -> None:
    monitor = begun()
    monitor.failed("worker 1: the worker's process died")
    monitor.mistake("AttributeError: 'NoneType' object has no attribute 'rank'")
    assert monitor.ended() is None
    assert monitor.begin(2)["failures"] == 1
    monitor.mistake("AttributeError: it comes again", "Traceback: where")
    assert (monitor.ended(), monitor.details()) == (
        "AttributeError: it comes again",
        "Traceback: where",
    )


def test_no_failure_is_survived_with_max_failures_0_and_any_number_with_minus_1() -> None:
    assert "failed 1 times so far" in fail(begun(max_failures=0))["end"]
    monitor = begun(max_failures=-1)
    for _ in range(3000):
        assert "end" not in fail(monitor)
    assert monitor.ended() is None


@pytest.mark.parametrize(
    ("backoff_s", "pauses"),
    [(2.0, [0, 2, 4, 8, 16, 32, 60, 60]), (0.0, [0] * 8), (90.0, [0, 60, 60])],
)
def test_the_pause_before_a_restart_doubles_up_to_a_minute(
    backoff_s: float, pauses: list[float]
) -> None:
    monitor = begun(max_failures=-1, backoff_s=backoff_s)
    assert [fail(monitor)["pause_s"] for _ in pauses] == pauses
    assert max(pauses) <= LONGEST_BACKOFF_S
    monitor.report(saved(1))
    assert fail(monitor)["pause_s"] == 0


def test_the_reason_is_the_cause_and_not_what_followed_from_it() -> None:
    monitor = begun()
    monitor.failed("worker 0: connection closed by peer")
    monitor.failed("worker 1: no progress for 300 s while in step 5", first=True)
    assert monitor.begin(2)["reason"] == "worker 1: no progress for 300 s while in step 5"
    assert fail(monitor, "worker 0: died")["reason"] == "worker 0: died"


def test_a_resize_is_no_failure() -> None:
    monitor = begun(max_failures=0)
    assert monitor.begin(1) == {"reason": "resized from 2 to 1 workers"}
    assert monitor.begin(3) == {"reason": "resized from 1 to 3 workers"}
    assert monitor.begin(3) == {"reason": "Ray started the workers again"}
    assert monitor.ended() is None


def test_a_failure_with_fewer_workers_after_it_counts_as_one() -> None:
    assert fail(begun(max_failures=0), workers=1)["end"]


def test_save_is_delivered_once_and_leave_sticks() -> None:
    monitor = begun()
    assert monitor.signal() == 0
    monitor.tell(SAVE)
    assert [monitor.signal() for _ in range(3)] == [SAVE, 0, 0]
    monitor.tell(SAVE)
    monitor.tell(LEAVE)
    monitor.tell(SAVE)
    fail(monitor)  # a group that is started again is told, too
    assert [monitor.signal() for _ in range(3)] == [LEAVE, LEAVE, LEAVE]


def test_leaving_has_something_to_save_only_once_workers_have_begun() -> None:
    waiting, training = Monitor(3, 2.0), begun()
    assert (waiting.leave(), training.leave()) == (False, True)
    assert waiting.signal() == training.signal() == LEAVE


def test_the_first_mistake_is_what_the_run_ends_with_and_lines_are_taken_once() -> None:
    monitor = begun()
    monitor.mistake("the disk is full")
    monitor.mistake("another worker: the disk is full")
    assert monitor.ended() == "the disk is full"
    monitor.report({"step": 1})
    monitor.report({"step": 2})
    assert [line["step"] for line in monitor.take()] == [1, 2]
    assert monitor.take() == []


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            {
                "event": "continued",
                "step": 20,
                "workers": 2,
                "reason": "worker 1: died",
                "steps_again": 3,
                "lost_s": 7.4,
            },
            "continued after step 20 with 2 worker(s) (worker 1: died; 3 steps again, 7 s lost)",
        ),
        (
            {"event": "continued", "step": 0, "workers": 1, "reason": "started again"},
            "begun again with 1 worker(s) (started again)",
        ),
        (
            {"event": "skipped", "reason": "/run/step_20: meta.json is not as it was written"},
            "checkpoint skipped: /run/step_20: meta.json is not as it was written",
        ),
        ({"event": "stopped", "step": 9, "reason": "told"}, "saved and stopped after step 9"),
        ({"event": "saved", "step": 9}, ""),
    ],
)
def test_the_user_is_shown_what_happened_in_a_line(line: dict[str, Any], shown: str) -> None:
    out = io.StringIO()
    ProgressLine(out)(line)
    assert out.getvalue() == (f"{shown}\n" if shown else "")


# -- evaluations beside training -----------------------------------------------------------------


def test_what_was_evaluated_is_told_again_until_it_is_recorded() -> None:
    """Rank 0 may die between hearing of it and writing it down."""
    monitor = begun()
    for step in (20, 10):
        monitor.made(Made(step, Evaluation(step, {"wer/dev": 0.5})))
    assert [made.step for made in monitor.unrecorded()] == [10, 20]
    fail(monitor)
    assert [made.step for made in monitor.unrecorded()] == [10, 20]
    monitor.recorded(10)
    monitor.recorded(10)
    assert [made.step for made in monitor.unrecorded()] == [20]
    assert monitor.tried() == {10, 20}  # neither is evaluated again by this submission


@pytest.mark.parametrize("end", [Monitor.alone, Monitor.leave, lambda m: m.mistake("no room")])
def test_evaluations_are_wanted_until_training_ends_or_leaves(
    end: Callable[[Monitor], Any],
) -> None:
    monitor = begun()
    monitor.tell(SAVE)
    assert monitor.wanted() and not monitor.is_over()
    end(monitor)
    assert not monitor.wanted()
    monitor.over()
    assert monitor.is_over()


def test_workers_that_evaluate_end_when_they_are_told_to_leave() -> None:
    """They have nothing to save: neither they nor ones started for them go on."""
    monitor = Monitor(3, 0.0, 40, training=False)
    monitor.begin(1)
    assert monitor.leave()
    assert monitor.ended() == "the evaluation was ended before it was done"
