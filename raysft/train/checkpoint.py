"""Save and load the state of a run: sharded, asynchronously, published when it is durable.

`Saver.start` copies the state to host memory (all that training waits for), then a thread of every
worker writes that worker's shards, hashed on the way; when all have, rank 0 publishes the
checkpoint and only then prunes older ones. One save is in flight: the next waits for it. Costs host
memory of one copy of what a worker writes. See `catalogue` for the layout.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import IO, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from typing_extensions import Buffer

from raysft import patience
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.parallel import Strategy, World
from raysft.parallel.strategy import State
from raysft.parallel.world import new_host_group
from raysft.run.catalogue import MARKER, Catalogue, Saved
from raysft.run.ownership import ANYONE, Permit
from raysft.run.storage import Folder, Storage
from raysft.train import shards

_MODEL = "model."  # what the names of weights begin with in a state


@dataclass
class Save:
    """One save, on this worker. Times in seconds."""

    step: int
    stalled: float  # training waited: for the copy, and at the next save for the end of this one
    begun: float
    seconds: float = 0.0  # until it was published (rank 0) or this worker's shards were written
    bytes: int = 0  # of all files (rank 0)
    error: BaseException | None = None
    thread: threading.Thread | None = field(default=None, repr=False)


class Saver:
    """Saves of one start of a run; a worker group makes its own, together."""

    def __init__(
        self,
        catalogue: Catalogue,
        world: World,
        keep: int,
        spare: Callable[[list[int]], Collection[int]] = lambda steps: (),
        extras: dict[str, bytes] | None = None,
        permit: Permit = ANYONE,
        settle: Callable[[], None] = lambda: None,
        derive: Callable[[dict[str, torch.Tensor]], dict[str, bytes]] | None = None,
        name: str = "",
    ) -> None:
        """A collective.

        keep: checkpoints that stay. spare: of all steps there are, others that stay (the best),
        asked when older ones go. extras: path in the checkpoint -> content, the same in each.
        permit: asked before the first byte of a save, before its marker, and before anything goes.
        settle: brings to the disk what belongs to the checkpoint and is not in it (the ledger).
        derive: further files of a checkpoint, made of the weights it holds (by name, on the CPU).
        name: of this start; that of a later one sorts after it.
        """
        self.catalogue, self.world, self.keep = catalogue, world, keep
        self._spare, self._extras, self._permit = spare, extras or {}, permit
        self._settle, self._derive = settle, derive
        self._token = world.share(f"{name}.{uuid.uuid4().hex}".lstrip("."))
        self._storage = catalogue.storage
        # Of its own, on CPU tensors: a save's messages must not meet those of training.
        self._group = new_host_group() if dist.is_initialized() else None
        self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
        self._mark = b""  # of the save that is about to be published
        self._pruning = threading.Lock()
        self._running: Save | None = None
        self._done: list[Save] = []

    def start(
        self,
        step: int,
        strategy: Strategy,
        meta: JsonObject,
        more: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Begin to save; returns once the state is copied. A collective.

        more: tensors to save beside the strategy's, the same on every worker.

        Raises UserError where the save before this one, which it waits for, has failed.
        """
        self.wait()
        begun = time.monotonic()
        staged = self._stager.stage({**strategy.state(), "more": more or {}})
        save = Save(step, time.monotonic() - begun, begun)
        save.thread = threading.Thread(
            target=self._run, args=(save, staged, meta), daemon=True, name="checkpoint"
        )
        save.thread.start()
        self._running = save

    def wait(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Until nothing is in flight; calls `waiting` every second.

        Raises UserError where that save has failed.
        """
        begun = time.monotonic()
        if self._running is not None and self._running.thread is not None:
            while self._running.thread.is_alive():
                waiting()
                self._running.thread.join(timeout=1.0)
            self._running.stalled += time.monotonic() - begun
        self._finish()

    def join(self, seconds: float) -> None:
        """Until nothing is in flight, but no longer than this; what failed is not told."""
        if self._running is not None and self._running.thread is not None:
            self._running.thread.join(timeout=seconds)

    def finished(self) -> list[Save]:
        """Saves that ended since the last call. Raises UserError where one has failed."""
        running = self._running
        if running is not None and running.thread is not None and not running.thread.is_alive():
            self._finish()
        done, self._done = self._done, []
        return done

    def prune(self) -> None:
        """Delete what `keep` and `spare` do not hold (after an evaluation has changed the best)."""
        if self.world.is_main:
            self._permit.require()
            with self._pruning:  # the thread of a save does it too
                self.catalogue.prune(self.keep, self._spare)

    def _finish(self) -> None:
        save, self._running = self._running, None
        if save is None:
            return
        if save.error is not None:
            where = self._storage.where(f"step_{save.step}")
            raise UserError(
                f"{where}: the checkpoint cannot be written: {_cause(save.error)}"
            ) from save.error
        self._done.append(save)

    def _run(self, save: Save, staged: State, meta: JsonObject) -> None:
        name = f"step_{save.step}"
        draft = self._storage.draft(name, self._token)
        ours = self.world.is_main  # to be cleared away where it fails: nothing half-written stays
        try:
            self._permit.require()
            self._settle()
            writer = _writer(self._storage, f"{draft}/state")
            written = _hash(writer)
            dcp.save(
                staged,
                storage_writer=writer,
                process_group=self._group,
                no_dist=self._group is None,
            )
            written = self._together(written)
            if self.world.is_main:
                save.bytes = self._prepare(draft, {"step": save.step, **meta}, written)
                self._permit.require()
                # What is published has left a folder's draft; in a store it is the draft itself.
                ours = isinstance(self._storage, Folder)
                self._storage.publish(draft, name, MARKER, self._mark)
                self.prune()
        except (OSError, CheckpointException, UserError) as error:
            save.error = self._taken() or error  # whose files went with their run, has lost that
            if ours:
                with contextlib.suppress(OSError):  # it may be the storage that has failed
                    self._storage.remove(draft)
        except BaseException as error:  # noqa: BLE001 - raised in the training thread
            save.error = error
        save.seconds = time.monotonic() - save.begun

    def _taken(self) -> UserError | None:
        try:
            self._permit.require()
        except (UserError, OSError) as error:
            return error if isinstance(error, UserError) else None
        return None

    def _together(self, written: Digests) -> Digests:
        """Of all workers' files, on rank 0. A collective of the saves."""
        if self._group is None:
            return written
        parts = [written] * self.world.size if self.world.is_main else []
        dist.gather_object(written, parts or None, group=self._group)
        return {name: found for part in parts for name, found in part.items()}

    def _prepare(self, draft: str, meta: JsonObject, written: Digests) -> int:
        """All that a checkpoint holds but its marker, `self._mark`; returns its bytes."""
        # torch writes its list of shards beside, and renames it.
        names = {name: name.removesuffix(".tmp") for name in written}
        files = {f"state/{names[name]}": found for name, found in written.items()}
        extras = dict(self._extras)
        if self._derive is not None:
            extras.update(self._derive(_weights(self._storage, f"{draft}/state")))
        for path, content in extras.items():
            self._storage.write(f"{draft}/{path}", content)
            files[path] = (sha256(content).hexdigest(), len(content))
        content = json.dumps({**meta, "files": files}).encode()
        self._storage.write(f"{draft}/meta.json", content)
        self._mark = f"{sha256(content).hexdigest()}\n".encode()
        return sum(size for _, size in files.values())


def load(
    saved: Saved, strategy: Strategy, more: dict[str, torch.Tensor] | None = None
) -> JsonObject:
    """Load model and optimizer in place (any strategy, any world size), and `more` as it was given
    to the save; returns meta.json. A collective."""
    strategy.load(partial(_fill, saved))
    if more:
        _fill(saved, {"more": more})
    return saved.meta()


def load_weights(saved: Saved, strategy: Strategy) -> None:
    """Load the model's weights alone, in place. A collective."""
    strategy.load(partial(_fill, saved), weights_only=True)


def read_weights(saved: Saved) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint holds, by name, whole, on the CPU; in this process alone."""
    return _weights(saved.storage, f"{saved.root}/state")


def _weights(storage: Storage, root: str) -> dict[str, torch.Tensor]:
    found = {
        name.removeprefix(_MODEL): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in shards.tensors(storage, root).items()
        if name.startswith(_MODEL)
    }
    shards.fill(storage, root, {"model": found}, alone=True)
    return found


def _fill(saved: Saved, state: State) -> None:
    root = f"{saved.root}/state"
    shards.fill(saved.storage, root, state, alone=not dist.is_initialized())


def newest_sound(catalogue: Catalogue, world: World) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint whose every file is as it was written, and why newer ones are not it.

    Each worker reads its share of the files. A collective.
    """
    steps = world.gather([saved.step for saved in catalogue.committed()])[0]

    def damage(saved: Saved) -> str | None:
        found = world.gather(saved.damage(world.rank, world.size))
        return next((reason for reason in found if reason), None)

    found, skipped = catalogue.newest(damage, [Saved(step, catalogue.storage) for step in steps])
    cut_off = catalogue.unfinished(found.step if found is not None else 0)
    return found, [*skipped, *world.gather(cut_off)[0]]


Digests = dict[str, tuple[str, int]]
"""Of files by name: sha256 (hex) and bytes."""


class _Hashed(io.RawIOBase):
    """A file that is written from its beginning to its end, and hashed on the way."""

    def __init__(self, below: IO[bytes]) -> None:
        self._below, self._sum, self._size = below, sha256(), 0

    def write(self, content: Buffer) -> int:
        """All of it."""
        self._below.write(content)
        self._sum.update(content)
        size = memoryview(content).nbytes
        self._size += size
        return size

    def tell(self) -> int:
        """Bytes so far."""
        return self._size

    def flush(self) -> None:
        """To the system."""
        self._below.flush()

    def fileno(self) -> int:
        """For an fsync."""
        return self._below.fileno()

    def digest(self) -> tuple[str, int]:
        """Of what was written."""
        return self._sum.hexdigest(), self._size


def _hash(writer: dcp.FileSystemWriter) -> Digests:
    """Of the files that `writer` writes from now on; of one written again, the last."""
    found: Digests = {}
    create = writer.fs.create_stream

    @contextlib.contextmanager
    def create_stream(path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with create(path, mode) as below:
            if mode != "wb":
                yield below
                return
            stream = _Hashed(cast(IO[bytes], below))
            yield stream
        found[os.fspath(path).rsplit("/", 1)[-1]] = stream.digest()

    writer.fs.create_stream = create_stream  # type: ignore[method-assign]
    return found


class _Patient:
    """Joined to a torch writer: what fails for a moment is tried again."""

    storage: Storage
    root: str

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As torch's, which makes the folder."""
        prepare = super().prepare_local_plan  # type: ignore[misc]
        return patience.patiently(lambda: prepare(plan), self.storage.where(self.root))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """As torch's, which writes the same files again where it failed."""

        def write() -> Future[list[WriteResult]]:
            try:
                return super(_Patient, self).write_data(plan, planner)  # type: ignore[misc]
            except RuntimeError as error:  # torch's zip writer says so of any error below it
                raise _system_error(error) or error from None

        return patience.patiently(write, self.storage.where(self.root))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """As torch's, which writes the file of metadata: beside, then renamed."""
        finish = super().finish  # type: ignore[misc]
        patience.patiently(lambda: finish(metadata, results), self.storage.where(self.root))


class _FolderWriter(_Patient, dcp.FileSystemWriter):
    pass


class _StoreWriter(_Patient, FsspecWriter):
    pass


def _writer(storage: Storage, root: str) -> _FolderWriter | _StoreWriter:
    writer: _FolderWriter | _StoreWriter
    if isinstance(storage, Folder):
        writer = _FolderWriter(storage.where(root))
    else:  # an object that is closed is durable; torch would sync all disks of the machine
        writer = _StoreWriter(storage.where(root), sync_files=False)
    writer.storage, writer.root = storage, root
    return writer


def _system_error(error: BaseException) -> OSError | None:
    """The operating system's error below another, if it was one."""
    below: BaseException | None = error
    while below is not None and not isinstance(below, OSError):
        below = below.__cause__ or below.__context__
    return below


def _cause(error: BaseException) -> str:
    """The operating system's words, dug out of what torch wraps around them."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, CheckpointException):
        found = [_cause(wrapped[0]) for wrapped in error.failures.values()]
        return found[0] if found else str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if error.__cause__ is not None or error.__context__ is not None:
        return _cause(error.__cause__ or error.__context__ or error)
    return str(error)
