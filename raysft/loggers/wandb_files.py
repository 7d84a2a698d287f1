"""What W&B has written about a run on this machine's disk: the rows of its .wandb files.

A file is a log of LevelDB's layout behind a head of 7 bytes: blocks of 32 KiB of pieces, each a
checksum (4 bytes), a length (2), a kind (1: whole, 2: first, 3: middle, 4: last) and its bytes; a
record is a message of wandb.proto. One that was cut off by a kill ends where it can be read no
further.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from raysft.json_types import JsonObject
from raysft.loggers.sender import Known

_HEAD, _PIECE, _BLOCK = 7, 7, 32768
_WHOLE, _LAST = 1, 4


def known(folder: Path, name: str, online: bool) -> Known:
    """What the files that starts of the run `name` have left below `folder`/wandb hold. online:
    also of starts that were to send what they wrote."""
    step, evaluation = -1, (-1, False)
    for start in ("offline-run-*", *(["run-*"] if online else [])):
        for path in (folder / "wandb").glob(f"{start}-{name}/run-{name}.wandb"):
            for row in rows(path):
                step = max(step, int(row.get("train/step", -1)))
                found = int(row.get("eval/step", -1)), bool(row.get("eval/final", 0))
                evaluation = max(evaluation, found)
    return Known(step, evaluation)


def rows(path: Path) -> Iterator[JsonObject]:
    """The rows of a .wandb file, in order, as far as it can be read."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    for raw in _records(path.read_bytes()):
        record = Record()
        try:
            record.ParseFromString(raw)
        except DecodeError:
            return
        if record.HasField("history"):
            yield {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }


def _records(content: bytes) -> Iterator[bytes]:
    at, parts = _HEAD, b""
    while at + _PIECE <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _PIECE:  # too little for a piece: filled up
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece = content[at + _PIECE : at + _PIECE + length]
        if not _WHOLE <= kind <= _LAST or len(piece) < length:
            return
        parts += piece
        at += _PIECE + length
        if kind in (_WHOLE, _LAST):
            yield parts
            parts = b""
