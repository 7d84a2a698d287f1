"""Items that are lines of a file: surveyed in blocks, read by byte range, in constant memory.

Costs: the survey reads at the speed of two hashes (about 0.5 GB/s a core), a scan at that of
readline.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from raysft import stores
from raysft.data.sources.base import (
    BOM,
    CHUNK_BYTES,
    ITEM_TAIL,
    MAX_ITEM_BYTES,
    Chunk,
    Format,
    Item,
    Split,
    Survey,
    chunk_digest,
    ends_chunk,
)
from raysft.json_types import JsonObject

HEAD = 1 << 16  # bytes


class JsonLines(Format):
    """What formats whose items are lines have in common: a source is one file."""

    noun = "line"

    def files(self, path: Path, split: Split) -> list[Path]:
        """The file itself."""
        return [path]

    def survey(self, file: Path) -> Survey:
        """Hash and chunks, cut between lines."""
        return survey(file)

    def items(self, file: Path, chunk: Chunk | None = None) -> Iterator[Item]:
        """The lines that are not blank."""
        return items(file, chunk)


def survey(file: Path, chunk_bytes: int = CHUNK_BYTES) -> Survey:
    """Hash `file` and cut it: behind `chunk_bytes` of a chunk, after the first line that
    `ends_chunk`; where there is none, after the first behind twice as many."""
    digest, own = hashlib.sha256(), chunk_digest(0)
    chunks: list[Chunk] = []
    start, first, lines, size = 0, 1, 0, 0
    begun, open_since = b"", 0  # the end of the line that the last block left open; its first byte
    with stores.opened(file) as stream:
        while block := stream.read(chunk_bytes):
            digest.update(block)
            at = 0
            while cut := _cut(
                block, begun, size - open_since, start + chunk_bytes - size, chunk_bytes
            ):
                own.update(block[at:cut])
                lines += block.count(b"\n", at, cut)
                chunks.append(Chunk(start, size + cut, first, own.hexdigest()))
                at, start, first, lines = cut, size + cut, first + lines, 0
                own = chunk_digest(start)
            own.update(block[at:])
            lines += block.count(b"\n", at)
            last = block.rfind(b"\n") + 1
            begun = (block[last:] if last else begun + block)[-ITEM_TAIL:]
            open_since = size + last if last else open_since
            size += len(block)
    if start < size:
        chunks.append(Chunk(start, size, first, own.hexdigest()))
    return Survey(digest.hexdigest(), size, tuple(chunks))


def _cut(block: bytes, begun: bytes, before: int, least: int, chunk_bytes: int) -> int:
    """Where in `block` a chunk ends that is large enough at `least`; 0: not in this block. before:
    bytes of the line that the block goes on with, of which `begun` are the last."""
    end = block.find(b"\n", max(0, least - 1)) + 1
    while end:
        begin = block.rfind(b"\n", 0, end - 1) + 1
        line = block[begin:end] if begin else begun + block[:end]
        length = end - begin if begin else before + end
        if end >= least + chunk_bytes or ends_chunk(line, length / chunk_bytes):
            return end
        end = block.find(b"\n", end) + 1
    return 0


def items(
    file: Path, chunk: Chunk | None = None, max_bytes: int = MAX_ITEM_BYTES
) -> Iterator[Item]:
    """The lines that are not blank. One longer than `max_bytes` is given without its bytes."""
    offset, line = (chunk.start, chunk.first) if chunk else (0, 1)
    with stores.opened(file) as stream:
        stream.seek(offset)
        while chunk is None or offset < chunk.stop:
            raw = stream.readline(max_bytes)
            if not raw:
                return
            size = len(raw)
            if size == max_bytes and not raw.endswith(b"\n"):
                raw = b""
                while (rest := stream.readline(max_bytes)) and not rest.endswith(b"\n"):
                    size += len(rest)
                size += len(rest)
                yield Item(offset, 0, line, None, f"longer than {max_bytes >> 20} MiB")
            elif (raw if offset else raw.removeprefix(BOM)).strip():
                yield Item(offset, size, line, raw)
            offset += size
            line += 1


def first_lines(file: Path, limit: int = 1 << 16) -> list[bytes]:
    """The first lines that are not blank, of `limit` bytes; the first of them whole (up to
    `MAX_ITEM_BYTES`), unless it begins a list."""
    return stores.recall(("lines", str(file), limit), lambda: _first_lines(file, limit))


def first_objects(file: Path) -> Iterator[JsonObject]:
    """The objects among the first lines: a broken line costs that line, not the recognition of the
    file."""
    for line in first_lines(file):
        try:
            record = json.loads(line.removeprefix(BOM).strip().rstrip(b","))
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def _first_lines(file: Path, limit: int) -> list[bytes]:
    with stores.opened(file) as stream:
        start = stream.read(limit)
        first = start.removeprefix(BOM).lstrip()
        if b"\n" not in first and len(start) == limit and not first.startswith(b"["):
            start += stream.readline(MAX_ITEM_BYTES) + stream.read(limit)
    lines = start.removeprefix(BOM).split(b"\n")
    return [line for line in lines if line.strip()]


def head(file: Path, limit: int = HEAD) -> bytes:
    """The first `limit` bytes of a file: what formats are recognised by."""
    whole = max(limit, HEAD)  # one look for all who ask for less

    def look() -> bytes:
        with stores.opened(file) as stream:
            return stream.read(whole)

    return stores.recall(("head", str(file), whole), look)[:limit]
