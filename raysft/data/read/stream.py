"""Planned micro-batches through tasks of Ray: CPU nodes read, decode, featurise; a worker receives.

Every training worker has a stream of its own lanes. The works it wants next are cut into chunks; a
chunk is one streaming task, which yields each micro-batch as soon as it is ready. A worker begins
chunks in order and takes their micro-batches in order, however late a chunk is.

A stream speaks with its own tasks only: no actor of the cluster knows of it, so a worker's cost is
the same beside 1,000 others (Ray Data's is not: docs/clusters.md, benchmarks/scale.py). Costs about
1 ms a micro-batch on its way, and one copy of it, into shared memory. Look-ahead of a worker:
at most `AHEAD` bytes a CPU, judged by the micro-batches that came. A task process or a node that
dies is replaced and its chunk is read again, in order.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import ray

from raysft import failures, patience, plugins, preload
from raysft.data.clips.stalled import MOST_STUCK, stuck
from raysft.data.example import MicroBatch
from raysft.data.plan.generations import Column, Places, open_index
from raysft.data.read.reader import CHUNK, Reader, Work, amount, chunks
from raysft.errors import UserError

if TYPE_CHECKING:
    from ray import ObjectRefGenerator
    from ray.remote_function import RemoteFunction

AHEAD = 128 << 20  # bytes of micro-batches a CPU that are read, or being read, ahead of the worker
SHARE = 4  # a chunk holds at most 1 / SHARE of that, so that there are several a CPU
LARGE = 4 * CHUNK  # of this size: each task costs some milliseconds to begin
BEGUN = 2  # chunks a CPU until the first micro-batch has shown how large they are
LOOK_S = 5.0  # Ray was seen not to say for long that something is there
NOTHING_S = 60.0  # without a micro-batch: perhaps no node is left that may read
FADES = 0.98  # of the most bytes seen, a micro-batch: a large one is not counted with for ever


@dataclass(frozen=True)
class ReaderSpec:
    """What a data task needs to make its `Reader`; made once a process, then reused.

    patience_s: seconds to wait for a file that its storage does not give. plugins: to be loaded.
    """

    index: Places
    encoder: ray.ObjectRef  # of the encoder
    budget: int
    seed: int | None
    patience_s: float = patience.SECONDS
    plugins: tuple[str, ...] = ()

    def reader(self) -> Reader:
        """The reader of this process."""
        patience.allow(self.patience_s)
        plugins.load(self.plugins)
        key = (self.index, self.encoder, self.budget, self.seed)
        if key not in _READERS:
            if len(_READERS) > 1:  # a run has one to train and one to evaluate
                _READERS.clear()
            index = open_index(self.index)
            _READERS[key] = Reader(index, ray.get(self.encoder), self.budget, self.seed)
        return _READERS[key]


_READERS: dict[tuple[object, ...], Reader] = {}


@dataclass(frozen=True)
class Mistake:
    """What a task yields in place of a micro-batch where no retry mends it."""

    message: str


def read_micro_batches(spec: ReaderSpec, chunk: list[Work]) -> Iterator[MicroBatch | Mistake]:
    """The task: a micro-batch for each work of the chunk, in order."""
    if stuck() >= MOST_STUCK:  # nothing has begun: Ray does this task in a fresh process
        os._exit(1)
    try:
        yield from spec.reader().read_chunk(chunk)
    except Exception as error:
        # As data: Ray would wrap it, and print a page of traceback.
        if not failures.certain(error):
            raise
        yield Mistake(failures.told(error))


class RayReader:
    """`read` as `Reader.read`, on `cpus` CPUs of the cluster."""

    def __init__(
        self,
        spec: ReaderSpec,
        seconds: np.ndarray | Column,
        cpus: float,
        nodes: Mapping[str, str] | None = None,
        elsewhere: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        """seconds: of audio by row. cpus: for this reader alone; under half of one, its one task
        asks for that share of a CPU. nodes: label selector of those that may read; {} or None: any.
        elsewhere: asked for another one when nothing came for `NOTHING_S`.

        Processes are started at once: they import what they need while the caller builds its model.
        """
        self.spec = spec
        self._seconds = seconds
        self.tasks = max(1, round(cpus))
        self.cpus_per_task = min(1.0, cpus / self.tasks)
        self._nodes, self._elsewhere = dict(nodes or {}), elsewhere
        warm_up = ray.remote(**self._options())(_warm_up)
        self._warming = [warm_up.remote(spec) for _ in range(self.tasks)]

    def read(self, works: Iterator[Work]) -> Iterator[MicroBatch]:
        """Micro-batches in the order of `works`. Closing the iterator ends its tasks."""
        ahead = _Ahead(self._task(), self.spec, self.tasks, works, self._seconds, self._move)
        try:
            while (batch := ahead.take()) is not None:
                yield batch
        finally:
            ahead.close()

    def _options(self) -> dict[str, object]:
        where = {"label_selector": self._nodes} if self._nodes else {}
        # Else a process for it would import what its caller does.
        environment = {"env_vars": preload.READER}
        options = {"num_cpus": self.cpus_per_task, "max_retries": -1, "runtime_env": environment}
        return {**options, **where}

    def _task(self) -> RemoteFunction:
        return ray.remote(num_returns="streaming", **self._options())(read_micro_batches)

    def _move(self) -> RemoteFunction | None:
        """The task for other nodes, where there are none left of those that read; else None."""
        nodes = dict(self._elsewhere()) if self._elsewhere is not None else self._nodes
        if nodes == self._nodes:
            return None
        self._nodes = nodes
        for warming in self._warming:
            ray.cancel(warming)
        return self._task()


def _warm_up(spec: ReaderSpec) -> None:
    spec.reader()


@dataclass
class _Chunk:
    """A task that was begun. works: all of it. amounts: of its works that have not been taken."""

    batches: ObjectRefGenerator
    works: list[Work]
    amounts: deque[float]
    running: bool = True


class _Ahead:
    """Tasks of a stream, oldest first: begins as many as may run, and no more than fit."""

    def __init__(
        self,
        task: RemoteFunction,
        spec: ReaderSpec,
        tasks: int,
        works: Iterator[Work],
        seconds: np.ndarray | Column,
        move: Callable[[], RemoteFunction | None],
    ) -> None:
        self._task, self._spec, self._tasks, self._seconds = task, spec, tasks, seconds
        self._move = move
        self._begun: deque[_Chunk] = deque()
        self._chunks = chunks(works, seconds, self._sizes())
        self._bytes: float | None = None  # the most for an amount of 1, of late
        self._held = 0.0  # amount of all that was begun and not taken
        self._next: tuple[list[Work], deque[float]] | None = None
        self._pull()

    def take(self) -> MicroBatch | None:
        """The next micro-batch, once it is there; None after the last. Raises the UserError that
        came in its place."""
        self._begin()
        if not self._begun:
            return None
        self._wait()
        chunk = self._begun[0]
        reference = next(chunk.batches)
        while True:
            try:
                found = ray.get(reference, timeout=NOTHING_S)
                break
            except ray.exceptions.GetTimeoutError:  # it was on a node that is lost
                if self._moved():
                    return self.take()
        if isinstance(found, Mistake):
            raise UserError(found.message)
        amount_of_it = chunk.amounts.popleft()
        self._held -= amount_of_it
        self._bytes = max(FADES * (self._bytes or 0.0), found.nbytes / max(1.0, amount_of_it))
        if not chunk.amounts:  # what is left of its task is to end
            self._begun.popleft()
        return found

    def close(self) -> None:
        """End all tasks."""
        for chunk in self._begun:
            if chunk.running:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.cancel(chunk.batches)
        self._begun.clear()

    def _sizes(self) -> Iterator[float]:
        """Of chunks, as an amount of work: small while nothing is known, so that the first
        micro-batches come early and from all CPUs."""
        for _ in range(BEGUN * self._tasks):
            yield CHUNK
        while True:
            fit = AHEAD / SHARE / self._bytes if self._bytes else CHUNK
            yield min(LARGE, fit)

    def _pull(self) -> None:
        chunk = next(self._chunks, None)
        amounts = deque(amount(work, self._seconds) for work in chunk or ())
        self._next = None if chunk is None else (chunk, amounts)

    def _begin(self) -> None:
        """Begin chunks while there is a CPU for them and room for what they bring."""
        while self._next is not None:
            chunk, amounts = self._next
            if sum(chunk.running for chunk in self._begun) >= self._tasks:
                return
            if self._begun and not self._fits(sum(amounts)):
                return
            batches = self._task.remote(self._spec, chunk)
            self._begun.append(_Chunk(batches, chunk, amounts))
            self._held += sum(amounts)
            self._pull()

    def _fits(self, more: float) -> bool:
        if self._bytes is None:
            return len(self._begun) < BEGUN * self._tasks
        return (self._held + more) * self._bytes <= AHEAD * self._tasks

    def _moved(self) -> bool:
        """Whether other nodes read from now on: all that was begun is begun anew there, from what
        was not taken on."""
        task = self._move()
        if task is None:
            return False
        self._task = task
        for chunk in self._begun:
            ray.cancel(chunk.batches)
            left = chunk.works[len(chunk.works) - len(chunk.amounts) :]
            chunk.batches, chunk.running = task.remote(self._spec, left), True
        return True

    def _wait(self) -> None:
        """Until the oldest chunk's next micro-batch is there; meanwhile, as tasks end, begin
        others."""
        begun = time.monotonic()
        while True:
            running = {chunk.batches.completed(): chunk for chunk in self._begun if chunk.running}
            head = self._begun[0].batches
            waited = [head, *running]
            ready, _ = ray.wait(waited, num_returns=len(waited), timeout=0)
            if not ready:
                ready, _ = ray.wait(waited, num_returns=1, timeout=min(LOOK_S, NOTHING_S))
            if ready:
                begun = time.monotonic()
            elif time.monotonic() - begun >= NOTHING_S:
                begun = time.monotonic()
                if self._moved():
                    continue
            for reference in ready:
                if reference is not head:
                    running[reference].running = False
            self._begin()
            if any(reference is head for reference in ready):
                return
