"""A run at Weights & Biases.

Its x axis is `step`, a figure of each row: W&B's own counter of rows never goes back and refuses
who does. What W&B has is its own word: the summary of a run that goes on, or, offline, the files
that earlier starts have left, for what is handed to it waits in memory before it is written or
sent.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raysft.config import Config, to_tree
from raysft.config.logs import Wandb
from raysft.json_types import JsonObject
from raysft.loggers import wandb_files
from raysft.loggers.apart import Apart
from raysft.loggers.names import of_evaluation, of_metrics
from raysft.loggers.sender import Known, evaluated
from raysft.loggers.state import kept_id
from raysft.run.answers import RATE, Answers, Shown
from raysft.run.place import new_id

if TYPE_CHECKING:
    from wandb import Run

TAG = 64  # letters of one, at most
FLUSH_S = 2.0  # that rows wait before they are in the file


class ToWandb:
    """See the module."""

    name = "log.wandb"

    def __init__(self, config: Config, settings: Wandb, folder: Path, answers: Answers) -> None:
        self._config, self._settings = config, settings
        self._folder, self._answers = folder, answers
        self._run: Run | None = None
        self._heard, self._stored = False, Apart(self.name)

    def open(self) -> Known:
        """Begin the run, or go on with it."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        given, log = self._settings, self._config.log
        name = kept_id(self._folder, f"wandb {given.entity or ''}/{given.project}", new_id)
        quiet: JsonObject = {"console": "off", "silent": True}
        for key, value in (("x_transaction_log_flush_interval", FLUSH_S), ("x_primary", True)):
            if key in wandb.Settings.model_fields:  # names of its own, which may go
                quiet[key] = value
        known = wandb_files.known(self._folder, name, online=given.mode == "offline")
        self._run = wandb.init(
            project=given.project,
            entity=given.entity,
            mode=given.mode,
            id=name,
            resume="allow",
            name=self._config.run.name,
            group=log.group,
            tags=[*given.tags, *([log.group[:TAG]] if log.group else [])],
            job_type="train",
            config=to_tree(self._config),
            allow_val_change=True,
            dir=str(self._folder),
            reinit="create_new",
            settings=wandb.Settings(**quiet),
        )
        self._run.define_metric("*", step_metric="step")
        known = max(known, _known(dict(self._run.summary)), key=lambda one: one.step)
        self._last = known.evaluation
        self._heard = known.evaluation[0] >= 0
        return known

    def metrics(self, lines: Sequence[JsonObject]) -> None:
        """A row each."""
        for line in lines:
            self._log({"step": line["step"], "train/step": line["step"], **of_metrics(line)})

    def evaluation(self, line: JsonObject) -> None:
        """A row of figures, one with a table of answers, and at the first one with clips."""
        step, final = evaluated(line)
        self._last = max(self._last, (step, final))  # one made up for later is not the last
        told = {"eval/step": self._last[0], "eval/final": int(self._last[1])}
        self._log({"step": step, **told, **of_evaluation(line)})
        if shown := self._answers.at(step):
            self._stored(lambda: self._show(step, shown))

    def _show(self, step: int, shown: Sequence[Shown]) -> None:
        import wandb

        columns: list[str] = [*("step", "source", "id", "words that differ", "reference", "answer")]
        rows = [[step, a.source, a.id, a.errors, a.reference, a.hypothesis] for a in shown]
        self._log({"step": step, "eval/answers": wandb.Table(columns=columns, data=rows)})
        if self._heard:
            return
        self._heard = True
        clips = [
            wandb.Audio(clip.samples, sample_rate=RATE, caption=clip.said)
            for clip in self._answers.clips()
        ]
        if clips:
            self._log({"step": step, "eval/clips": clips})

    def event(self, line: JsonObject) -> None:
        """A row without a figure."""
        where = f" after step {line['step']}" if "step" in line else ""
        why = f": {line['reason']}" if line.get("reason") else ""
        self._log({"event": f"{line['event']}{where}{why}"})

    def close(self, outcome: str) -> None:
        """Wait until all is written, or sent."""
        assert self._run is not None  # it was opened
        self._run.finish(exit_code=1 if outcome == "failed" else 0)

    def _log(self, row: JsonObject) -> None:
        assert self._run is not None  # it was opened
        self._run.log(row)


def _known(summary: Mapping[str, object]) -> Known:
    """Of the last values of all figures."""
    found = {
        key: int(value)
        for key in ("train/step", "eval/step", "eval/final")
        if isinstance(value := summary.get(key), int | float)
    }
    evaluation = found.get("eval/step", -1), bool(found.get("eval/final", 0))
    return Known(found.get("train/step", -1), evaluation)
