"""The folder of several stages (`stages` of the config), `run.storage_path/run.name`.

stages.yaml    each stage's config as it was asked for at the last start
stages.json    their names in order; of each that is finished, with which config, at which step
NAME/          a stage's run, a folder as any run's
NAME_best/     its best model, for from_pretrained; appears whole or not at all
report.html    a page over all stages
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from raysft.config.stages import best_of
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.run.storage import write_whole

STATE, CONFIG = "stages.json", "stages.yaml"


@dataclass(frozen=True)
class Finished:
    """A stage that has come to its end. config: digest of the config it was asked for with. step:
    its last; best: that of which NAME_best is; by: the metric, None where it is the last."""

    config: str
    step: int
    best: int
    by: str | None


class StagesFolder:
    """What is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, name: str) -> Path:
        """The folder of a stage's run."""
        return self.path / name

    def best(self, name: str) -> Path:
        """Where its best model is, once it is finished."""
        return best_of(self.path, name)

    def begun(self, name: str) -> bool:
        """Whether its run was started."""
        return (self.run(name) / "config.yaml").is_file()

    def names(self) -> list[str]:
        """Of the stages, in order."""
        return list(self._read()["names"])

    def finished(self, name: str) -> Finished | None:
        """How it ended; None: it has not."""
        found = self._read()["finished"].get(name)
        return None if found is None else Finished(**found)

    def open(self, names: Sequence[str], config: str) -> None:
        """Begin, or go on; the folder is there, and this process its owner. config: as YAML text.

        Raises UserError where it holds a run or a sweep.
        """
        for file, what in (("config.yaml", "a run"), ("sweep.yaml", "a sweep")):
            if (self.path / file).is_file():
                raise UserError(f"{self.path}: holds {what}, no stages; choose another run.name")
        for left in self.path.glob(".*.partial-*"):  # of an export that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._write({**self._read(), "names": list(names)})
        write_whole(self.path / CONFIG, config.encode())

    def finish(self, name: str, how: Finished) -> None:
        """Remember that a stage is finished."""
        found = self._read()
        self._write({**found, "finished": {**found["finished"], name: asdict(how)}})

    def table(self) -> list[JsonObject]:
        """A row a stage: {"stage", "status", "step", "best", "by", "begun"}."""
        rows = []
        for name in self.names():
            how, begun = self.finished(name), self.begun(name)
            status = "finished" if how else "begun" if begun else "waiting"
            ended = (how.step, how.best, how.by) if how is not None else (None, None, None)
            row = dict(zip(("step", "best", "by"), ended, strict=True))
            rows.append({"stage": name, "status": status, **row, "begun": begun})
        return rows

    def _read(self) -> JsonObject:
        path = self.path / STATE
        try:
            found = json.loads(path.read_bytes())
            return {"names": found["names"], "finished": found["finished"]}
        except FileNotFoundError:
            return {"names": [], "finished": {}}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); delete it: finished stages are looked at anew"
            ) from error

    def _write(self, state: JsonObject) -> None:
        write_whole(self.path / STATE, json.dumps(state).encode())


def digest_of(config: JsonObject) -> str:
    """Of a config's tree."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def refuse_folder(folder: Path) -> None:
    """Raises UserError, naming the stages' folders, where `folder` holds stages and no run."""
    if (folder / STATE).is_file():
        runs = ", ".join(str(folder / name) for name in StagesFolder(folder).names())
        raise UserError(f"{folder}: holds stages, each of them a run; name one of {runs}")
