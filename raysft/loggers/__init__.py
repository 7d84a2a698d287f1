"""Where a run is shown beside its own files: TensorBoard, Weights & Biases, MLflow.

`Loggers` is given the lines of metrics.jsonl, eval.jsonl and events.jsonl as they are written, by
rank 0. Each logger has a thread of its own, so that one that waits for a network holds up neither
training nor the others; one that fails is told of once, and the run goes on without it. What a
logger has already it says itself when it is opened (`Known`), for what was handed to it before a
kill need not have arrived: it is then given what is missing from the run's files, and steps that
are trained again are not given twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from raysft.config import Config
from raysft.json_types import JsonObject
from raysft.loggers.sender import Known, Sender, Sink
from raysft.run.answers import Answers
from raysft.run.lines import read_lines

__all__ = ["Known", "Loggers", "Sender", "Sink"]

# Seconds that loggers may take at the end, all together.
END_S = {"finished": 60.0, "stopped": 10.0, "failed": 5.0}


class Loggers:
    """All loggers of a run, on rank 0."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        step: int,
        permit: Callable[[], None],
        more: Callable[[Answers], list[Sink]],
    ) -> None:
        """config: of the run in `folder`, which goes on after `step`; permit: raises where this
        process owns it no longer; more: other loggers, of the answers that all of them show."""
        answers = Answers(config, folder)
        sinks = [*_sinks(config, folder, answers), *more(answers)]
        lines = read_lines(folder / "eval.jsonl", {"step": int}) if sinks else []
        before = [line for line in lines if line["step"] <= step]
        self._senders = [Sender(sink, folder, step, before, permit) for sink in sinks]
        self._most_s = config.parallel.timeout_s / 3  # others wait meanwhile

    def put(self, kind: str, line: JsonObject) -> None:
        """A line that was written; kind: metrics, eval or events."""
        for sender in self._senders:
            sender.put(kind, line)

    def failures(self) -> list[str]:
        """Those that failed since this was asked, a line each."""
        said = [sender.failure() for sender in self._senders]
        return [line for line in said if line is not None]

    def close(self, outcome: str) -> None:
        """Let them take what is still to be taken, for a while. outcome: finished, stopped, or
        failed."""
        for sender in self._senders:
            sender.finish(outcome)
        until = time.monotonic() + min(END_S[outcome], self._most_s)
        for sender in self._senders:
            sender.join(max(0.0, until - time.monotonic()))


def _sinks(config: Config, folder: Path, answers: Answers) -> list[Sink]:
    found: list[Sink] = []
    if config.log.wandb is not None:
        from raysft.loggers.to_wandb import ToWandb

        found.append(ToWandb(config, config.log.wandb, folder, answers))
    if config.log.mlflow is not None:
        from raysft.loggers.to_mlflow import ToMlflow

        found.append(ToMlflow(config, config.log.mlflow, folder, answers))
    return found
