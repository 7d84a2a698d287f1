"""What a logger is given: what it has not got yet; and that one which fails ends nothing."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from raysft import loggers
from raysft.loggers.sender import Known, Sender
from raysft.run.folder import run_folder
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support.logged import STEPS, config_of, trained
from tests.support.worlds import start
from tests.unit.train.test_checkpoint import ONE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Listener:
    """A logger that keeps what it is given."""

    name = "log.mine"

    def __init__(self, has: Known) -> None:
        self.has, self.steps, self.evaluations = has, list[int](), list[tuple[int, Any]]()
        self.events, self.outcome = list[str](), ""

    def open(self) -> Known:
        return self.has

    def metrics(self, lines: Sequence[dict[str, Any]]) -> None:
        self.steps += [line["step"] for line in lines]

    def evaluation(self, line: dict[str, Any]) -> None:
        self.evaluations.append((line["step"], line["wer/dev"]))

    def event(self, line: dict[str, Any]) -> None:
        self.events.append(line["event"])

    def close(self, outcome: str) -> None:
        self.outcome = outcome


def evaluation(step: int, wer: float, final: bool = False) -> dict[str, Any]:
    return {"step": step, "wer/dev": wer, "final": final}


@pytest.mark.parametrize(
    ("has", "steps", "evaluations"),
    [
        # It has nothing: what the files say up to 6, then all that comes.
        (Known(), [*range(1, 11)], [(4, 0.4), (6, 0.6), (6, 0.65), (8, 0.8), (8, 0.85)]),
        # A kill took what was handed to it after 5.
        (Known(5, (4, False)), [*range(6, 11)], [(6, 0.6), (6, 0.65), (8, 0.8), (8, 0.85)]),
        # Nine steps arrived before the kill: 7 to 9 are trained again, 8 is evaluated again.
        (Known(9, (8, False)), [10], [(6, 0.65), (8, 0.85)]),
    ],
)
def test_it_is_given_what_it_has_not_got(
    tmp_path: Path, has: Known, steps: list[int], evaluations: list[tuple[int, float]]
) -> None:
    lines = [{"step": step, "loss": 1.0} for step in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    listener = Listener(has)
    before = [evaluation(4, 0.4), evaluation(6, 0.6)]
    sender = Sender(listener, tmp_path, 6, before)
    sender.put("events", {"event": "continued", "step": 6})
    sender.put("eval", evaluation(6, 0.65))  # of something else: data.eval has changed
    for step in (7, 8):
        sender.put("metrics", {"step": step})
    sender.put("events", {"event": "saved", "step": 8})
    for given in (evaluation(8, 0.8), evaluation(8, 0.85, final=True)):
        sender.put("eval", given)
    for step in (9, 10):
        sender.put("metrics", {"step": step})
    sender.finish("stopped")
    sender.join(60)
    assert listener.steps == steps
    assert listener.evaluations == evaluations
    assert listener.events == ["continued"], "a checkpoint is nobody's news"
    assert listener.outcome == "stopped" and sender.failure() is None


def warned(folder: Path) -> list[str]:
    lines = read_lines(folder / "events.jsonl")
    return [line["reason"] for line in lines if "log." in str(line.get("reason"))]


@pytest.mark.slow
def test_without_a_network_a_run_goes_on_without_them(tmp_path: Path) -> None:
    config = config_of(tmp_path, log__wandb={}, log__mlflow={"tracking_uri": "http://127.0.0.1:9"})
    nobody = {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "a" * 40,
        "WANDB_INIT_TIMEOUT": "2",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    assert trained(config, environment=nobody) == 0
    folder = run_folder(config)
    said = sorted(warned(folder))
    assert len(said) == 2, "each once"
    assert said[0].startswith("log.mlflow has failed, the run goes on without it: ")
    assert said[1].startswith("log.wandb has failed, the run goes on without it: ")
    assert all("\n" not in line for line in said)
    assert len(read_lines(folder / "metrics.jsonl")) == STEPS


def test_a_server_that_does_not_answer_holds_up_the_end_for_a_while_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loggers.END_S, "finished", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        away = {"tracking_uri": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        run = start(config_of(tmp_path, log__mlflow=away), ONE)
        done = time.monotonic()
        assert train(run) == STEPS
        assert time.monotonic() - done < 60, "MLflow itself would wait for minutes"
    (said,) = warned(run.folder)
    assert said == "log.mlflow has not taken all within 1 s at the end; the rest is left out"
    assert os.path.exists(run.folder / "checkpoints" / f"step_{STEPS}" / "COMMITTED")
