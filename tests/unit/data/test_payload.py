"""Arrays of an example, whatever they are called: joined, carried and told apart without a name."""

from __future__ import annotations

import pickle
from itertools import chain

import numpy as np

from raysft.data.example import MicroBatch, Sequence
from raysft.data.read import digest
from tests.support.batches import differences

RNG = np.random.default_rng(0)
PATCHES = [[RNG.random((3, 2, 4)).astype(np.float32)], [], [RNG.random((n, 2, 4)) for n in (1, 5)]]
RATINGS = [[np.array([4, 2], np.int16)], [np.array([1], np.int16)], []]


def batch() -> MicroBatch:
    sequences = [
        Sequence(f"s{n}", "asr", np.arange(n + 1, dtype=np.int32), np.arange(n + 1, dtype=np.int32))
        for n in range(3)
    ]
    for sequence, patches, ratings in zip(sequences, PATCHES, RATINGS, strict=True):
        sequence.arrays = {
            "patches": [array.astype(np.float32) for array in patches],
            "ratings": ratings,
            "nobody_has_any": [],
        }
    return MicroBatch.join(0, 1, 0, sequences)


def pickled(before: MicroBatch) -> MicroBatch:
    """As Ray's shared memory gives it: arrays apart from the rest, and not to be written to."""
    buffers: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(before, protocol=5, buffer_callback=buffers.append)
    assert len(rest) < sum(buffer.raw().nbytes for buffer in buffers) + 2000
    return pickle.loads(rest, buffers=[bytes(buffer.raw()) for buffer in buffers])


def test_they_come_through_the_stream_as_they_were_and_each_to_its_sequence() -> None:
    before = batch()
    assert sorted(before.arrays) == ["patches", "ratings"]
    after = pickled(before)
    assert differences(before, after) == []
    for name, wanted in (("patches", PATCHES), ("ratings", RATINGS)):
        found = after.arrays[name].of_sequences(3)
        assert [len(arrays) for arrays in found] == [len(arrays) for arrays in wanted]
        for mine, theirs in zip(chain(*found), chain(*wanted), strict=True):
            np.testing.assert_array_equal(mine, theirs.astype(mine.dtype))


def test_the_ledger_tells_another_value_of_any() -> None:
    digests = {digest.tensors(batch())}
    for name in ("patches", "ratings"):
        changed = batch()
        changed.arrays[name].values.reshape(-1)[-1] += 1
        digests.add(digest.tensors(changed))
    assert len(digests) == 3
