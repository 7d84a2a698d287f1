"""Planned micro-batches through Ray Data: CPU nodes read, decode and featurise; a worker receives.

Every training worker has a stream of its own lanes. The works it wants next are cut into chunks;
a chunk is one Ray Data read task that yields each micro-batch as soon as it is ready. The plan is
lazy and endless while a dataset is finite, so a stream is a chain of datasets ("spans"): the first
is short, so that training starts early; each next one starts while the one before is consumed.

Cost: 2 to 4 ms a micro-batch for its way through Ray Data, and one copy of it, into shared memory.
Look-ahead of a worker: at most two spans, of `SPAN` chunks a CPU; a chunk of audio is about
1,000 s (33 MB as 80-bin features). A task process that dies is replaced and its chunk is read
again, in order.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from raysft import failures, patience, plugins
from raysft.data.clips.stalled import MOST_STUCK, stuck
from raysft.data.example import MicroBatch, Quarantined, Ragged
from raysft.data.plan.generations import Column, Places, open_index
from raysft.data.read.reader import CHUNK, Reader, Work, chunks
from raysft.errors import UserError
from raysft.json_types import JsonObject

FIRST_SPAN = 2  # chunks a CPU in the first span: of CHUNK, so that the first batches come early
SPAN = 4  # chunks a CPU in later ones
LARGE = 4 * CHUNK  # of this size: between two tasks a process waits 10 to 100 ms for the driver


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


class _Chunks(Datasource):
    """A Ray Data source with one read task a chunk of works."""

    def __init__(self, spec: ReaderSpec, span: list[list[Work]]) -> None:
        self._spec = spec
        self._span = span

    def get_name(self) -> str:
        return "micro_batches"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_read(self._spec, chunk), metadata) for chunk in self._span]


def _read(spec: ReaderSpec, chunk: list[Work]) -> Callable[[], Iterable[pa.Table]]:
    def blocks() -> Iterator[pa.Table]:
        if stuck() >= MOST_STUCK:  # nothing has begun: Ray does this task in a fresh process
            os._exit(1)
        try:
            for batch in spec.reader().read_chunk(chunk):
                yield to_table(batch)
        except Exception as error:
            # As data: Ray would wrap it, and print a page of traceback.
            if not failures.certain(error):
                raise
            yield pa.table({_MISTAKE: [failures.told(error)]})

    return blocks


_MISTAKE = "mistake"
_ARRAYS = ("lengths", "input_ids", "labels")
_RAGGED = ("values", "lengths", "owners")
_FACTS = ("epoch", "step", "lane", "ids", "tasks", "seconds", "slots", "langs", "tensors")


def to_table(batch: MicroBatch) -> pa.Table:
    """A micro-batch as a table of one row, without a copy of its arrays (nor any pickle)."""
    facts: JsonObject = {name: getattr(batch, name) for name in _FACTS}
    facts["quarantined"] = [[q.id, q.source, q.path, q.reason, q.kind] for q in batch.quarantined]
    facts["shapes"] = {name: ragged.values.shape for name, ragged in batch.arrays.items()}
    columns: dict[str, pa.Array] = {"facts": pa.array([json.dumps(facts)])}
    arrays = {name: getattr(batch, name) for name in _ARRAYS}
    for name, ragged in batch.arrays.items():
        arrays |= {f"{name}/{field}": getattr(ragged, field) for field in _RAGGED}
    for name, array in arrays.items():
        values = pa.array(np.ascontiguousarray(array).reshape(-1))
        columns[name] = pa.LargeListArray.from_arrays(pa.array([0, len(values)]), values)
    return pa.table(columns)


def from_table(table: pa.Table) -> MicroBatch:
    """The inverse of `to_table`. The arrays are views of the table: not writable.

    Raises the UserError that came instead of a micro-batch.
    """
    if _MISTAKE in table.column_names:
        raise UserError(table[_MISTAKE][0].as_py())
    facts = json.loads(table["facts"][0].as_py())

    def array(name: str) -> np.ndarray:
        return table[name].chunk(0).flatten().to_numpy()

    ragged = {}
    for name, shape in facts.pop("shapes").items():
        values, lengths, owners = (array(f"{name}/{field}") for field in _RAGGED)
        ragged[name] = Ragged(values.reshape(shape), lengths, owners)
    quarantined = [Quarantined(*each) for each in facts.pop("quarantined")]
    facts |= {name: array(name) for name in _ARRAYS}
    return MicroBatch(**facts, arrays=ragged, quarantined=quarantined)


class RayReader:
    """`read` as `Reader.read`, on `cpus` CPUs of the cluster."""

    def __init__(self, spec: ReaderSpec, seconds: np.ndarray | Column, cpus: float) -> None:
        """seconds: the index's column, to make chunks of equal cost. Starts the task processes:
        they import what they need while the caller builds its model."""
        self.spec = spec
        self._seconds = seconds
        self.tasks = max(1, round(cpus))
        self.cpus_per_task = min(1.0, cpus / self.tasks)
        warm_up = ray.remote(num_cpus=self.cpus_per_task)(_warm_up)
        self._warming = [warm_up.remote(spec) for _ in range(self.tasks)]

    def read(self, works: Iterator[Work]) -> Iterator[MicroBatch]:
        """Micro-batches in the order of `works`. Closing the iterator ends its tasks."""
        _configure()
        spans = self._spans(works)
        current = self._start(next(spans, None))
        following: _Span | None = None
        try:
            while current is not None:
                for number, batch in enumerate(current):
                    if following is None and number >= current.works // 2:
                        following = self._start(next(spans, None))
                    yield batch
                if following is None:
                    following = self._start(next(spans, None))
                current, following = following, None
        finally:
            for span in (current, following):
                if span is not None:
                    span.close()

    def _start(self, span: list[list[Work]] | None) -> _Span | None:
        if span is None:
            return None
        dataset = ray.data.read_datasource(
            _Chunks(self.spec, span),
            override_num_blocks=len(span),
            num_cpus=self.cpus_per_task,
            concurrency=min(self.tasks, len(span)),
        )
        return _Span(dataset, sum(len(chunk) for chunk in span))

    def _spans(self, works: Iterator[Work]) -> Iterator[list[list[Work]]]:
        first, later = FIRST_SPAN * self.tasks, SPAN * self.tasks
        sizes = chain(repeat(CHUNK, first), repeat(LARGE))
        parts = chunks(works, self._seconds, sizes)
        lengths = chain([first], repeat(later))
        while span := list(islice(parts, next(lengths))):
            yield span


def _warm_up(spec: ReaderSpec) -> None:
    spec.reader()


class _Span:
    """One running dataset. Its tasks start at once, not when the first batch is asked for."""

    def __init__(self, dataset: ray.data.Dataset, works: int) -> None:
        self.works = works
        self._batches = iter(
            dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        )
        self._first: list[pa.Table | Exception | None] = []
        self._starter = threading.Thread(target=self._begin, daemon=True, name="span")
        self._starter.start()

    def _begin(self) -> None:
        try:
            self._first.append(next(self._batches, None))
        except Exception as error:  # noqa: BLE001 - raised by the consumer, in `__iter__`
            self._first.append(error)

    def __iter__(self) -> Iterator[MicroBatch]:
        self._starter.join()
        first = self._first[0]
        if isinstance(first, Exception):
            raise first
        table = first
        while table is not None:
            yield from_table(table)
            table = next(self._batches, None)

    def close(self) -> None:
        """End the dataset's tasks."""
        self._starter.join()
        self._batches.close()


def _configure() -> None:
    """Ray Data's settings for streams of small ordered blocks (process-wide)."""
    context = DataContext.get_current()
    context.target_max_block_size = (
        1  # else the micro-batches of a task arrive together, at its end
    )
    context.execution_options.preserve_order = True
    # Reservation admits one task in a dataset's first second and splits CPUs evenly between
    # datasets; spans bound the look-ahead instead, and `concurrency` the CPUs.
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Warns that there are no progress bars.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
