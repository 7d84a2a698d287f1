"""Rows of token ids, and ids with labels: what USDM's preparation writes.

    1 733 16289 28793 2                   every id is learnt (pre-training)
    1 733 16289 28793 2|-100 -100 16289 28793 -100      those whose label is the id itself

A line is an example; labels stand at their ids, not shifted. With `document_start` in the entry a
row that packs several documents is cut before each of that id (1 for USDM), and none of them sees
another. The ids are the model's tokenizer's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from raysft import stores
from raysft.config.schema import Source
from raysft.data.example import Example, Tokens
from raysft.data.sources import json_lines
from raysft.data.sources.base import BOM, default_id, load_record
from raysft.data.sources.layout import LISTED, Layout, fault, refuse_fault
from raysft.errors import BadExample
from raysft.json_types import JsonObject

IGNORED = -100
_ROW = re.compile(rb"\s*\d+(?:[ \t]+\d+)*\s*(?:\|\s*-?\d+(?:[ \t]+-?\d+)*\s*)?")


class TokenIds(Layout):
    """The format `token_ids`."""

    name = "token_ids"
    noun = "line"
    options = ("document_start",)
    describe = "rows of token ids, or ids|labels (USDM)"

    def lists(self, given: Source) -> bool:
        """Where rows are to be cut."""
        return given.document_start is not None

    def sniff(self, path: Path) -> bool:
        """Whether its first line is such a row."""
        if stores.is_dir(path):
            return False
        found = json_lines.first_lines(path)[:1]
        return bool(found) and b" " in found[0].strip() and _ROW.match(found[0]) is not None

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A document each."""
        for item in json_lines.items(file):
            row = default_id(file, item.line)
            at = f"{file.name}:{item.line}"
            try:
                tokens = _tokens((item.raw or b"").removeprefix(BOM))
            except BadExample as error:
                yield fault(row, str(error), at)
                continue
            starts = [n for n, one in enumerate(tokens.ids) if n and one == given.document_start]
            for number, (a, b) in enumerate(pairwise([0, *starts, len(tokens.ids)]), 1):
                learnt = [int(one) for one in tokens.learnt[a:b]]
                name = f"{row}.{number}"
                yield {LISTED: 1, "id": name, "ids": tokens.ids[a:b], "learnt": learnt, "at": at}

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of a row, or of a listed document."""
        raw = raw.removeprefix(BOM)
        if not raw.lstrip().startswith(b"{"):
            return Example(default_id(file, line), task or "tokens", (), (), tokens=_tokens(raw))
        record = load_record(raw)
        refuse_fault(record)
        if LISTED not in record:
            raise BadExample("is no row of ids", "malformed record")
        tokens = Tokens(tuple(record["ids"]), tuple(map(bool, record["learnt"])))
        if not any(tokens.learnt):
            raise BadExample("none of its ids is learnt", "malformed record")
        return Example(record["id"], task or "tokens", (), (), tokens=tokens)


def _tokens(raw: bytes) -> Tokens:
    """Raises BadExample naming what is wrong with a row."""
    first, bar, second = raw.partition(b"|")
    try:
        ids = tuple(map(int, first.split()))
        labels = tuple(map(int, second.split())) if bar else ids
    except ValueError as error:
        raise BadExample(f"is no row of ids: {error}", "malformed record") from None
    if not ids or min(ids) < 0:
        raise BadExample("is no row of ids: empty, or an id below 0", "malformed record")
    if len(labels) != len(ids):
        raise BadExample(f"has {len(ids)} ids and {len(labels)} labels", "malformed record")
    wrong = [n for n, (a, b) in enumerate(zip(ids, labels)) if b not in (a, IGNORED)]
    if wrong:
        raise BadExample(
            f"label {labels[wrong[0]]} stands at id {ids[wrong[0]]} (place {wrong[0]}): a label is "
            "its id, or -100; labels are not shifted",
            "malformed record",
        )
    if not any(label != IGNORED for label in labels):
        raise BadExample("none of its ids is learnt", "malformed record")
    return Tokens(ids, tuple(label != IGNORED for label in labels))


FORMAT = TokenIds()
