"""Read planned micro-batches: bytes -> waveforms -> sequences -> `MicroBatch`.

The one place where training data is decoded and featurised. It runs inside tasks of Ray
(`stream.py`) and, for tests and benchmarks, in process. Costs one decode and one feature pass a
clip; memory is that of one chunk of works' records and one micro-batch; where storage lets one
wait, also of `READS` clips, which are then read at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat

import numpy as np

from raysft.data.clips.audio import Shared, load
from raysft.data.clips.file import MISSING_SHARE
from raysft.data.clips.stalled import IN_A_ROW, ClipReader
from raysft.data.encode import Encoder
from raysft.data.example import Example, MicroBatch, Quarantined, Sequence
from raysft.data.index.build import Index
from raysft.data.plan.generations import Column, JoinedIndex
from raysft.data.read import digest
from raysft.errors import BadExample

CLIP_S = 2.0  # seconds of audio that take about as long to read as the rest of an example
CHUNK = 128  # examples of at most CLIP_S a chunk of work should hold: a quarter of a second's work
READS = 16  # clips asked for at once where the storage lets one wait
SLOW_S = 0.004  # that it lets wait for a clip, on average of `LOOKED_AT`
SLOW_TIMES = 2.0  # as long as decoding takes
LOOKED_AT = 32  # clips
GROWN = 2.0  # times its length in the index above which a clip is not even decoded


@dataclass(frozen=True, slots=True)
class Work:
    """One micro-batch to be read: the index rows of a (step, lane), but for those at the places
    `skip`."""

    epoch: int
    step: int
    lane: int
    rows: np.ndarray
    skip: frozenset[int] = frozenset()


Load = Callable[[], list[np.ndarray]]


class Storage:
    """Whether clips let one wait: measured while they are read one after the other.

    A network's file system answers for each clip some milliseconds late, a bucket behind FUSE 20 to
    100: a core that reads one at a time then idles. `slow` once and for all: nothing shows that it
    has become fast while many are read at once, which costs little there.
    """

    def __init__(self) -> None:
        self.slow = False
        self._waited = self._worked = 0.0
        self._count = 0

    def timed(self, load: Load) -> list[np.ndarray]:
        """load(), timed."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return load()
        finally:
            worked = time.process_time() - cpu
            self._worked += worked
            self._waited += max(0.0, time.perf_counter() - wall - worked)
            self._count += 1
            if self._count >= LOOKED_AT:
                each = self._waited / self._count
                self.slow = each > SLOW_S and self._waited > SLOW_TIMES * self._worked
                self._waited = self._worked = 0.0
                self._count = 0


@dataclass
class Reader:
    """Reads works with an index and an encoder; the same works give the same micro-batches.

    Raises UserError where data files have changed, or where the storage of a file that the index
    knows, clips included, answers no more.

    budget: positions a micro-batch may take, where examples turn out longer than planned.
    seed: of augmentation in training, drawn by (seed, epoch, step, lane, slot); None in evaluation.
    """

    index: Index | JoinedIndex
    encoder: Encoder
    budget: int
    seed: int | None
    _clips: ClipReader = field(init=False, repr=False)
    _several: ClipReader = field(init=False, repr=False)
    _shared: Shared = field(init=False, repr=False, default_factory=Shared)
    _storage: Storage = field(init=False, repr=False, default_factory=Storage)

    def __post_init__(self) -> None:
        self._clips = ClipReader(self.encoder.limits)
        # As many stall together as are read at once.
        self._several = ClipReader(self.encoder.limits, IN_A_ROW * READS)

    def read(self, works: Iterator[Work]) -> Iterator[MicroBatch]:
        """Micro-batches in the order of `works`, each as soon as it is ready."""
        for chunk in chunks(works, self.index.seconds):
            yield from self.read_chunk(chunk)

    def read_chunk(self, works: list[Work]) -> Iterator[MicroBatch]:
        """As `read`; the records of all works are fetched in one pass over their files."""
        reader = self._several if self._storage.slow else self._clips
        reader.refresh()
        rows = np.concatenate([work.rows for work in works]) if works else np.zeros(0, np.int64)
        found = self.index.examples(rows)
        skipped = [slot in work.skip for work in works for slot in range(len(work.rows))]
        examples = iter(found)
        todo = [
            partial(self._load, reader, example, row)
            for example, row, skip in zip(found, rows, skipped, strict=True)
            if not skip
        ]
        with closing(self._loads(todo)) as loads:
            for work in works:
                yield self._micro_batch(work, [next(examples) for _ in work.rows], loads)
        self._shared.clear()

    def _loads(self, todo: list[partial[list[np.ndarray]]]) -> Generator[Load]:
        """`todo`, in order: what gives the clips of an example. Read ahead, several at once, where
        the storage lets one wait."""
        if not self._storage.slow:
            yield from (partial(self._storage.timed, load) for load in todo)
            return
        pool = ThreadPoolExecutor(READS, "reads")
        ahead: deque[Load] = deque()
        try:
            for load in todo:
                # Parts share what was decoded of their file, one after the other.
                parts = any(clip.part for clip in load.args[1].audio())
                ahead.append(load if parts else pool.submit(load).result)
                if len(ahead) >= READS:
                    yield ahead.popleft()
            yield from ahead
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _micro_batch(
        self, work: Work, examples: list[Example], loads: Iterator[Load]
    ) -> MicroBatch:
        sequences: list[Sequence] = []
        slots: list[int] = []
        langs: list[str | None] = []
        rejected: list[Quarantined] = []
        planned = self.index.tokens[work.rows].tolist()
        spare = max(0, self.budget - sum(planned))
        for slot, example in enumerate(examples):
            if slot in work.skip:
                continue
            try:
                clips = next(loads)()
                rng = self._rng(work, slot)
                sequence = self.encoder.encode(example, clips, rng, promised=planned[slot])
                excess = len(sequence.input_ids) - planned[slot]
                if excess > spare:
                    raise BadExample(
                        f"takes {len(sequence.input_ids)} positions, {planned[slot]} were planned "
                        "from its header; it no longer fits its micro-batch",
                        "longer than indexed",
                    )
            except BadExample as error:
                rejected.append(self._quarantined(work.rows[slot], example, error))
                continue
            spare -= max(0, excess)
            sequences.append(sequence)
            slots.append(slot)
            says = self.encoder.says_language and example.task == "asr"
            langs.append(example.lang if says else None)
        batch = MicroBatch.join(
            work.epoch,
            work.step,
            work.lane,
            sequences,
            quarantined=rejected,
            slots=slots,
            langs=langs,
        )
        if self.seed is not None:  # to be trained on, and recorded
            batch.tensors = digest.tensors(batch)
        return batch

    def _rng(self, work: Work, slot: int) -> np.random.Generator | None:
        """Of each example its own, so that a quarantined one changes no other."""
        if self.seed is None:
            return None
        # Counter-based, thus made in 10 us; the counter's first number is that of the draws.
        counter = [0, work.step, work.lane, slot]
        key = [self.seed % 2**64, work.epoch]
        return np.random.Generator(np.random.Philox(counter=counter, key=key))

    def _load(self, reader: ClipReader, example: Example, row: int) -> list[np.ndarray]:
        audio = example.audio()
        if not audio:
            return []
        rate, limits = self.encoder.sample_rate, self.encoder.limits
        assert rate is not None  # an encoder that takes audio names its rate
        most = GROWN * float(self.index.seconds[row]) + 1.0
        decode = partial(
            load, rate=rate, limits=limits, most_seconds=most, indexed=True, shared=self._shared
        )
        clips = [reader.call(decode, clip) for clip in audio]
        seconds, planned = sum(map(len, clips)) / rate, float(self.index.seconds[row])
        if seconds < planned * (1 - MISSING_SHARE):
            raise BadExample(
                f"{audio[0].path}: shorter than indexed: {seconds:.2f} s, expected {planned:.2f} "
                "s: was the file replaced? A new run measures it again",
                "shorter than indexed",
            )
        return clips

    def _quarantined(self, row: int, example: Example, error: BadExample) -> Quarantined:
        audio = example.audio()
        path = audio[0].path if audio else ""
        source = self.index.source_name(row)
        return Quarantined(example.id, source, path, str(error), error.kind)


def amount(work: Work, seconds: np.ndarray | Column) -> float:
    """How much there is to do, in examples of `CLIP_S`. seconds: of audio by row."""
    return max(len(work.rows), float(seconds[work.rows].sum()) / CLIP_S)


def chunks(
    works: Iterator[Work], seconds: np.ndarray | Column, sizes: Iterable[float] = repeat(CHUNK)
) -> Iterator[list[Work]]:
    """Join works until they hold about as much to do as `sizes` examples of `CLIP_S`, each in turn.

    seconds: of audio by row, the index's column.
    """
    sizes = iter(sizes)
    size = next(sizes)
    chunk: list[Work] = []
    held = 0.0
    for work in works:
        chunk.append(work)
        held += amount(work, seconds)
        if held >= size:
            yield chunk
            chunk, held, size = [], 0.0, next(sizes)
    if chunk:
        yield chunk
