"""Whose checkpoints lie in a place that runs could share (`checkpoint.path`).

A run has an id, which its config.yaml keeps and every one of its checkpoints names. A place holds
the checkpoints of one run: what finds those of another there is refused before it writes. Two new
runs that begin at once find none; of them the one that claimed the place last (claimed_by.json,
beside the checkpoints) has it, and the other ends at its first save.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path

from raysft.config.checkpoint import Checkpoint
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.run.catalogue import Catalogue, Saved, unreadable
from raysft.run.ownership import Permit
from raysft.run.storage import CLAIM, Storage, open_storage


def new_id() -> str:
    """Of a run that begins."""
    return uuid.uuid4().hex


def refuse_other(settings: Checkpoint, run: Path, ours: str | None, began: bool) -> None:
    """Raises UserError where the place that the run in folder `run` would keep its checkpoints in
    holds those of another.

    ours: its id. began: the run has been started before; with no id that was when runs had none,
    and its checkpoints have none either.
    """
    if settings.path is None:
        return
    committed = Catalogue(open_storage(run, settings.path)).committed()
    for saved in reversed(committed):
        if unreadable(saved) is None:
            refuse(saved, run, ours, began)
            return


def refuse(saved: Saved, run: Path, ours: str | None, began: bool = True) -> None:
    """As `refuse_other`, of one checkpoint that can be read."""
    theirs = saved.meta().get("run")
    if began and theirs in (None, ours):
        return
    whose = _told(_claimed(saved.storage), theirs)
    raise UserError(
        f"checkpoint.path: {saved.storage.where('').rstrip('/')} holds the checkpoints of another "
        f"run, {whose} (the newest: {saved.name}); this one is {_told({'folder': str(run)}, ours)}."
        " Give this run a place or a run.name of its own; the other one goes on by its own command "
        "(delete the checkpoints there if nobody needs them)"
    )


def _told(claim: JsonObject, run: str | None) -> str:
    folder = claim.get("folder", "whose folder is not known")
    return f"{folder} (id {run[:12]})" if run else f"{folder} (without an id)"


def _claimed(storage: Storage) -> JsonObject:
    try:
        with storage.open(CLAIM) as stream:
            return json.loads(stream.read())
    except FileNotFoundError:
        return {}


@dataclass
class Claim:
    """A run's place, claimed; asked together with the run's folder before a checkpoint is written.

    run: its id. folder: the run's, as its driver names it.
    """

    permit: Permit
    storage: Storage
    run: str
    folder: str

    def take(self) -> None:
        """From here on the place is this run's."""
        self.permit.require()
        content = json.dumps({"run": self.run, "folder": self.folder})
        self.storage.write(CLAIM, content.encode())

    def require(self) -> None:
        """Raises UserError where this start does not own its run any more, or another run has
        claimed the place."""
        self.permit.require()
        found = _claimed(self.storage)
        if found and (found["run"], found["folder"]) != (self.run, self.folder):
            raise UserError(
                f"checkpoint.path: {self.storage.where('').rstrip('/')} has been claimed by "
                f"another run, {_told(found, found['run'])}, since {self.folder} (id "
                f"{self.run[:12]}) began; this one ends: give each run a place or a run.name of "
                "its own"
            )
