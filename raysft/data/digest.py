"""What a micro-batch held, in a few characters: the digest of its tensors that the ledger keeps.

Made where the micro-batch is made, in the data task; `audit --deep` makes it again. Two parts,
"TEXT.FEATURES": token ids, labels, lengths, tasks and places are the same on every machine; samples
that a library has decoded and turned into features may differ in their last bits with its version,
so they are told apart. Costs 2 ns a byte of text, 0.3 ns a byte of features: about 1% of reading.
"""

from __future__ import annotations

import json
import zlib
from hashlib import blake2b

import numpy as np

from raysft.data.example import MicroBatch


def tensors(batch: MicroBatch) -> str:
    """16 hex digits of all that is text; then, where there are features, a point and 8 of them."""
    text = blake2b(json.dumps([batch.tasks, batch.slots]).encode(), digest_size=8)
    for array in (batch.lengths, batch.input_ids, batch.labels, batch.feature_lengths):
        text.update(len(array).to_bytes(8, "little"))
        text.update(np.ascontiguousarray(array, "<i4").data)
    if not batch.features.size:
        return text.hexdigest()
    return f"{text.hexdigest()}.{zlib.crc32(np.ascontiguousarray(batch.features, '<f4').data):08x}"
