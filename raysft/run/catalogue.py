"""The checkpoints of a run: which are whole, which is the newest sound one, which go.

    step_N/state/       torch distributed checkpoint: model and optimizer, by parameter name
    step_N/config.yaml  the config and the versions it ran with
    step_N/processor/   tokenizer and feature extractor
    step_N/adapter/     with peft.method: the adapter in peft's layout
    step_N/meta.json    step, cursor, running sums of metrics, world size; sha256 of files above
    step_N/COMMITTED    sha256 of meta.json; without it the checkpoint does not exist for readers

In a store these lie in step_N/save_TOKEN/, of which a step may have several where a save was
interrupted; the newest with its marker is the checkpoint.

Needs no torch: the driver and the audit read it too.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from raysft import patience
from raysft.config.checkpoint import Checkpoint
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.run.storage import Storage, digest, open_storage

MARKER = "COMMITTED"
_NAME = re.compile(r"step_(\d+)")
_BEGUN = re.compile(r"\.?step_(\d+)(\..*)?")  # a draft's name goes on


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint. It may still turn out to be damaged: see `damage`."""

    step: int
    storage: Storage

    @property
    def name(self) -> str:
        """As the storage knows it."""
        return f"step_{self.step}"

    @property
    def where(self) -> str:
        """Folder or URL, for messages."""
        return self.storage.where(self.name)

    @cached_property
    def root(self) -> str:
        """Where its files lie in the storage: that of the newest save with a marker."""
        roots = self.storage.roots(self.name)
        return next((root for root in roots if marked(self.storage, root)), self.name)

    def meta(self) -> JsonObject:
        """meta.json. Raises UserError where it is not what was committed."""
        try:
            content = self.read("meta.json")
            marker = self.read(MARKER).decode("ascii", "replace").strip()
        except OSError as error:
            raise UserError(f"{self.where}: cannot be read: {error.strerror or error}") from error
        if hashlib.sha256(content).hexdigest() != marker:
            raise UserError(f"{self.where}: meta.json is not as it was written (checksum differs)")
        return json.loads(content)

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """Read every `parts`-th file from number `part` on; what is wrong with them, or None."""
        try:
            files = self.meta()["files"]
            for name in sorted(files)[part::parts]:
                if patience.patiently(partial(self._digest, name), self.where) != files[name]:
                    return f"{name} is not as it was written (checksum differs)"
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        return None

    def read(self, name: str) -> bytes:
        """Content of one of its files."""

        def read() -> bytes:
            with self.storage.open(f"{self.root}/{name}") as stream:
                return stream.read()

        return patience.patiently(read, self.where)

    def _digest(self, name: str) -> list[str | int]:
        """sha256 and length of one of its files."""
        with self.storage.open(f"{self.root}/{name}") as stream:
            return list(digest(stream))


class Catalogue:
    """What lies in a storage."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @classmethod
    def of(cls, settings: Checkpoint, run: Path) -> Catalogue:
        """Of the run in folder `run`."""
        return cls(open_storage(run, settings.path))

    def committed(self) -> list[Saved]:
        """Checkpoints with a marker, oldest first. Raises UserError where one cannot be read:
        taken for missing, what it marks would be deleted."""
        steps = sorted(int(m[1]) for name in self.storage.names() if (m := _NAME.fullmatch(name)))
        return [Saved(step, self.storage) for step in steps if self._marked(f"step_{step}")]

    def newest(
        self,
        damage: Callable[[Saved], str | None] = lambda saved: unreadable(saved),
        committed: list[Saved] | None = None,
    ) -> tuple[Saved | None, list[str]]:
        """The newest checkpoint without damage (None: there is none at all), and what was wrong
        with newer ones. By default only looks at meta.json.

        Raises UserError if there are checkpoints and every one is damaged: starting at step 0
        because of that is a decision for the user.
        """
        skipped: list[str] = []
        for saved in reversed(self.committed() if committed is None else committed):
            reason = damage(saved)
            if reason is None:
                return saved, skipped
            skipped.append(f"{saved.where}: {reason}")
        if skipped:
            raise UserError(
                f"no checkpoint of this run can be read: {'; '.join(skipped)}; mend or restore "
                "one, or delete them all to train from the start"
            )
        return None, []

    def prune(
        self, keep: int, spare: Callable[[list[int]], Collection[int]] = lambda steps: ()
    ) -> None:
        """Delete all but the last `keep` committed ones, and of the steps there are those that
        `spare` names."""
        committed = self.committed()
        if len(committed) <= keep:
            return
        spared = spare([saved.step for saved in committed])
        for saved in committed[:-keep]:
            if saved.step not in spared:
                self.storage.withdraw(saved.name, MARKER)
                self.storage.remove(saved.name)

    def clear(self, keep_to: int) -> None:
        """Before a run goes on from step `keep_to` (0: from its start): what an interrupted save
        left behind goes; later checkpoints, skipped as damaged, lose their marker only."""
        whole = {saved.step for saved in self.committed()}
        for name in self.storage.names():
            match = _NAME.fullmatch(name)
            if match and int(match[1]) > keep_to and int(match[1]) in whole:
                self.storage.withdraw(name, MARKER)
            elif name.startswith(".step_") or (match and int(match[1]) not in whole):
                self.storage.remove(name)

    def unfinished(self, after: int) -> list[str]:
        """What there is of steps beyond `after` that is no checkpoint, and why."""
        found = []
        for name in sorted(self.storage.names()):
            match = _BEGUN.fullmatch(name)
            if match and int(match[1]) > after and (match[2] or not self._marked(name)):
                where = self.storage.where(name)
                found.append(f"{where}: has no commit marker: not finished, or damaged")
        return found

    def _marked(self, name: str) -> bool:
        return any(marked(self.storage, root) for root in self.storage.roots(name))


def marked(storage: Storage, root: str) -> bool:
    """Whether there is a commit marker at `root`. Raises UserError where it cannot be read."""
    try:
        storage.open(f"{root}/{MARKER}").close()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(
            f"{storage.where(root)}/{MARKER}: cannot be read: {error.strerror or error}"
        ) from error
    return True


def unreadable(saved: Saved) -> str | None:
    """What is wrong with the meta.json of a checkpoint, or None."""
    try:
        saved.meta()
    except UserError as error:
        return str(error)
    return None


def best_step(values: dict[int, dict[str, float]], metric: str, mode: str) -> int | None:
    """The step with the best value of an evaluation metric, the earliest of equal ones.

    values: step -> what an evaluation said. A value that is no finite number is none. None where
    no evaluation has the metric.
    """
    found = [
        (step, line[metric])
        for step, line in sorted(values.items())
        if math.isfinite(line.get(metric, math.nan))
    ]
    if not found:
        return None
    sign = 1 if mode == "min" else -1
    return min(found, key=lambda item: sign * item[1])[0]
