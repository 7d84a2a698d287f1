"""A run at MLflow: metrics by step, keys of the config as parameters, answers and clips as files.

What it has is its own word: the latest values of `train/step` and `eval/step`, which go there with
the figures of their line, all or none of them.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import soundfile

from raysft.config import Config, to_tree
from raysft.config.logs import SQLITE, Mlflow
from raysft.json_types import Json, JsonObject
from raysft.loggers.apart import Apart
from raysft.loggers.names import of_evaluation, of_metrics
from raysft.loggers.sender import Known, evaluated
from raysft.loggers.state import kept_id, shared_id
from raysft.run.answers import RATE, Answers, Shown, table

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

AT_ONCE = 1000  # metrics of a call, at most
PARAMS = 100  # parameters of one
LETTERS = 500  # of a parameter
_ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
GROUP = "raysft.group"  # a tag


def client_of(settings: Mlflow) -> MlflowClient:
    """Raises what MLflow does, where there is no such place; does not ask a server yet."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):  # which it sets when imported
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=settings.tracking_uri)


class ToMlflow:
    """See the module."""

    name = "log.mlflow"

    def __init__(self, config: Config, settings: Mlflow, folder: Path, answers: Answers) -> None:
        self._config, self._settings = config, settings
        self._folder, self._answers = folder, answers
        self._heard, self._stored = False, Apart(self.name)

    def open(self) -> Known:
        """Begin the run, or go on with it."""
        self._client = client_of(self._settings)
        uri, experiment = self._settings.tracking_uri, self._settings.experiment
        self._experiment = experiment_id(self._client, experiment, uri)
        place = f"mlflow {uri or 'MLFLOW_TRACKING_URI'} {experiment}"
        self._id = kept_id(self._folder, place, self._new)
        self._client.update_run(self._id, status="RUNNING")
        run = self._client.get_run(self._id)
        self._parameters(run.data.params)
        self._stored(lambda: self._file("config.yaml"))
        had = run.data.metrics
        evaluation = int(had.get("eval/step", -1)), bool(had.get("eval/final", 0))
        self._heard = evaluation[0] >= 0
        return Known(int(had.get("train/step", -1)), evaluation)

    def _new(self) -> str:
        tags = {}
        if (group := self._config.log.group) is not None:
            tags = {GROUP: group, "mlflow.parentRunId": self._parent(group)}
        name = self._config.run.name
        return self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id

    def _parent(self, group: str) -> str:
        """The run that those of a group are shown below: made by the first of them."""

        def new() -> str:
            made = self._client.create_run(self._experiment, run_name=group, tags={GROUP: group})
            self._client.set_terminated(made.info.run_id)
            return made.info.run_id

        place = f"mlflow {self._settings.tracking_uri} {self._settings.experiment} {group}"
        return shared_id(Path(self._config.run.storage_path), place, new)

    def _parameters(self, had: dict[str, str]) -> None:
        """Keys of the config; MLflow keeps a parameter as it was first, so that a key that another
        start has changed is a tag."""
        from mlflow.entities import Param, RunTag

        now = {key: text[:LETTERS] for key, text in _flat(to_tree(self._config)) if text}
        new = [Param(key, text) for key, text in now.items() if key not in had]
        for first in range(0, len(new), PARAMS):
            self._client.log_batch(self._id, params=new[first : first + PARAMS])
        changed = [RunTag(key, text) for key, text in now.items() if had.get(key, text) != text]
        if changed:
            self._client.log_batch(self._id, tags=changed)

    def metrics(self, lines: Sequence[JsonObject]) -> None:
        """A line is in one call: it is there, or not."""
        batch: list[Metric] = []
        for line in lines:
            own = _metrics({"train/step": line["step"], **of_metrics(line)}, line["step"])
            if len(batch) + len(own) > AT_ONCE:
                self._client.log_batch(self._id, metrics=batch)
                batch = []
            batch += own
        if batch:
            self._client.log_batch(self._id, metrics=batch)

    def evaluation(self, line: JsonObject) -> None:
        """Figures; answers as a table of all evaluations, and as text; at the first one clips."""
        step, final = evaluated(line)
        told = {"eval/step": step, "eval/final": int(final)}
        self._client.log_batch(self._id, metrics=_metrics({**told, **of_evaluation(line)}, step))
        if shown := self._answers.at(step):
            self._stored(lambda: self._show(step, shown))

    def _show(self, step: int, shown: Sequence[Shown]) -> None:
        self._client.log_text(self._id, table(shown), f"answers/step_{step}.md")
        columns = {
            "step": [step for _ in shown],
            "source": [one.source for one in shown],
            "id": [one.id for one in shown],
            "words that differ": [one.errors for one in shown],
            "reference": [one.reference for one in shown],
            "answer": [one.hypothesis for one in shown],
        }
        self._client.log_table(self._id, columns, "answers.json")
        if not self._heard:
            self._heard = True
            self._clips()

    def _file(self, name: str) -> None:
        self._client.log_artifact(self._id, str(self._folder / name))

    def _clips(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            for number, clip in enumerate(self._answers.clips()):
                name = re.sub(r"[^-.\w]+", "_", f"{number}_{clip.source}_{clip.id}")[:100]
                path = Path(scratch) / (name + ("_cut.wav" if clip.cut else ".wav"))
                soundfile.write(path, clip.samples, RATE, subtype="PCM_16")
                self._client.log_artifact(self._id, str(path), "clips")

    def event(self, line: JsonObject) -> None:
        """The last one is a tag; all of them are in events.jsonl, a file of the run at its end."""
        where = f" after step {line['step']}" if "step" in line else ""
        why = f": {line['reason']}" if line.get("reason") else ""
        self._client.set_tag(self._id, "raysft.event", f"{line['event']}{where}{why}"[:LETTERS])

    def close(self, outcome: str) -> None:
        """End the run."""
        self._stored(lambda: self._file("events.jsonl"))
        self._client.set_terminated(self._id, _ENDS[outcome])


def experiment_id(client: MlflowClient, name: str, uri: str | None) -> str:
    """Of the experiment, which is made where it is not there; files of a database's runs go beside
    the database."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    files = None
    if uri is not None and uri.startswith(SQLITE):
        files = (Path(uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()
    try:
        return client.create_experiment(name, artifact_location=files)
    except MlflowException:  # another run has made it meanwhile
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


def _metrics(figures: dict[str, float], step: int) -> list[Metric]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [
        Metric(re.sub(r"[^-\w./ :]", "_", key), float(value), now, step)
        for key, value in figures.items()
    ]


def _flat(tree: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of a tree and their values as text."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    elif tree is not None:
        yield re.sub(r"[^-\w./ :]", "_", prefix), str(tree)
