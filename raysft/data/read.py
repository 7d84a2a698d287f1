"""Read planned micro-batches: bytes -> waveforms -> sequences -> `MicroBatch`.

The one place where training data is decoded and featurised. It runs inside Ray Data tasks
(`stream.py`) and, for tests and benchmarks, in process. Costs one decode and one feature pass a
clip; memory is that of one chunk of works' records and one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raysft.data.audio import load
from raysft.data.encode import Encoder
from raysft.data.example import Example, MicroBatch, Quarantined, Sequence
from raysft.data.index import Index
from raysft.errors import BadExample

CHUNK = 128  # examples a chunk of work should hold: amortises a task, keeps the first batch early


@dataclass(frozen=True, slots=True)
class Work:
    """One micro-batch to be read: the index rows of a (step, lane)."""

    epoch: int
    step: int
    lane: int
    rows: np.ndarray


@dataclass
class Reader:
    """Reads works with an index and an encoder; the same works give the same micro-batches.

    `seed` is that of training augmentation (drawn by (seed, epoch, step, lane)); None in evaluation.
    """

    index: Index
    encoder: Encoder
    budget: int
    seed: int | None

    def read(self, works: Iterator[Work]) -> Iterator[MicroBatch]:
        """Micro-batches in the order of `works`, each as soon as it is ready."""
        for chunk in chunks(works):
            yield from self.read_chunk(chunk)

    def read_chunk(self, works: list[Work]) -> Iterator[MicroBatch]:
        """As `read`; the records of all works are fetched in one pass over their files."""
        rows = np.concatenate([work.rows for work in works]) if works else np.zeros(0, np.int64)
        examples = iter(self.index.examples(rows))
        for work in works:
            yield self._micro_batch(work, [next(examples) for _ in work.rows])

    def _micro_batch(self, work: Work, examples: list[Example]) -> MicroBatch:
        rng = None
        if self.seed is not None:
            key = [self.seed, work.epoch, work.step, work.lane]
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        sequences: list[Sequence] = []
        slots: list[int] = []
        rejected: list[Quarantined] = []
        planned = self.index.tokens[work.rows]
        room = max(self.budget, int(planned.sum())) if len(planned) else 0
        for slot, example in enumerate(examples):
            try:
                sequence = self._sequence(example, rng, int(planned[slot]))
                if len(sequence.input_ids) > max(room, int(planned[slot])):
                    raise BadExample(
                        f"takes {len(sequence.input_ids)} positions, {planned[slot]} were planned "
                        "from its header; it no longer fits its micro-batch"
                    )
            except BadExample as error:
                rejected.append(self._quarantined(work.rows[slot], example, str(error)))
                continue
            room -= len(sequence.input_ids)
            sequences.append(sequence)
            slots.append(slot)
        return MicroBatch.join(
            work.epoch, work.step, work.lane, sequences, quarantined=rejected, slots=slots
        )

    def _sequence(
        self, example: Example, rng: np.random.Generator | None, planned: int
    ) -> Sequence:
        rate = self.encoder.sample_rate
        clips = []
        for audio in example.audio():
            assert rate is not None  # an encoder that takes audio names its rate
            clips.append(load(audio.path, rate))
        return self.encoder.encode(example, clips, rng, promised=planned)

    def _quarantined(self, row: int, example: Example, reason: str) -> Quarantined:
        audio = example.audio()
        path = audio[0].path if audio else ""
        return Quarantined(example.id, self.index.source_name(row), path, reason)


def chunks(works: Iterator[Work], size: int = CHUNK) -> Iterator[list[Work]]:
    """Join works until they hold about `size` examples."""
    chunk: list[Work] = []
    held = 0
    for work in works:
        chunk.append(work)
        held += len(work.rows)
        if held >= size:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
