"""Reasons of quarantine by kind: what `data.max_quarantined` is explained with.

A reason is one readable line, made where the example was found unusable, which knows its kind too
(`BadExample`). What a raysft that kept no kinds has written (quarantine.jsonl, the index's cache)
has the line alone, as has what a format from outside says: there the kind is read from its text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from raysft.json_types import JsonObject

OTHER = "other"
OVER_BUDGET = "over budget"

# Kind -> what its reason says, where the line is all there is: after what it is about ("PATH: ",
# "FILE line 3: ", or nothing).
_WORDS = {
    "missing": r"no such file",
    "folder": r"a folder, not a file",
    "not a file": r"a pipe, socket or device, not a file",
    "unreadable": r"cannot be read",
    "stalled": r"no answer within",
    "empty": r"empty file",
    "not audio": r"not audio that|raw samples have no header|its header gives no",
    "truncated": r"(?:damaged or )?cut off",
    "NaN or infinite": r"has NaN or infinite samples",
    "silent": r"silent",
    "too short": r"too short|\d+ samples at \d+ Hz: shorter|its clip of .* s is (?:too )?short",
    "too long": r"too long|its clip is .* s, the model reads at most",
    "no such part": r"from \S+ to \S+ s is no part|has [\d.]+ s, of which|has no channel",
    "over budget": r"takes \d+ positions, more than data\.tokens_per_batch"
    r"|has \S+ s for the encoder, more than",
    "beyond learned positions": r"takes \d+ positions, and the model has learned",
    "longer than indexed": r"takes \d+ positions, (?:but )?\d+|longer than indexed",
    "shorter than indexed": r"shorter than indexed",
    "malformed record": r"not (?:valid|readable|a JSON)|fields? '|task_type is|holds half a surr",
    "bad text": r"its text (?:contains|cannot)",
    "one speaker twice": r"is a dialog in which speaker",
    "unknown unit": r"unit -?\d+, but",
    "unknown token": r"has the id \d+, and the tokenizer has",
    "no kind": r"token .* is in no group",
    "unknown language": r"its language |it names no language",
    "not one clip": r"has (?:no|\d+) clips?, and",
    "no speaker embedding": r"(?:has no|its) speaker embedding",
    "tokens of another length": r"its speech tokens \(\d+ rows\) are",
    "no pair": r"has no rejected answer|its chosen and its rejected answer",
}
KINDS = (*_WORDS, OTHER)
# Greedy: the last match counts, for what a reason is about, a path, may look like one.
_GROUPS = "|".join(f"(?P<k{number}>{words})" for number, words in enumerate(_WORDS.values()))
_KIND = re.compile(rf"(?:.*: )?(?:{_GROUPS})", re.DOTALL)


class _Found(Protocol):
    @property
    def reason(self) -> str: ...
    @property
    def kind(self) -> str | None: ...


def kind_of(found: _Found) -> str:
    """The kind, one of KINDS, of what was found unusable."""
    return found.kind if found.kind in KINDS else kind(found.reason)


def kind_of_line(line: JsonObject) -> str:
    """The kind of a line of quarantine.jsonl."""
    known = line.get("kind")
    return known if known in KINDS else kind(line["reason"])


def kind(reason: str) -> str:
    """The kind of a reason of which only the text is known."""
    found = _KIND.match(reason)
    return OTHER if found is None or found.lastgroup is None else KINDS[int(found.lastgroup[1:])]


class Known:
    """Which examples a run has quarantined, as rank 0 keeps it: by digests, 250 bytes each."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self._keys: set[bytes] = set()
        self._names: set[bytes] = set()

    def add(self, line: JsonObject) -> bool:
        """Take in a line of quarantine.jsonl; False where it is known.

        Data that was moved, or whose source was renamed, has its lines twice."""
        key = [str(line.get(name)) for name in ("source", "path", "id")]
        digest = _digest(key)
        if digest in self._keys:
            return False
        self._keys.add(digest)
        self._names.add(_digest(key[-1:]))
        self.kinds[kind_of_line(line)] += 1
        return True

    @property
    def names(self) -> int:
        """How many there are, by their ids alone: the same under two sources is one."""
        return len(self._names)


def _digest(texts: list[str]) -> bytes:
    content = json.dumps(texts).encode()
    return hashlib.blake2b(content, digest_size=16).digest()


def summary(kinds: Iterable[str]) -> str:
    """How many there are of each kind, most first: "412 missing, 30 not audio, 2 silent"."""
    counts = Counter(kinds)
    order = sorted(counts, key=lambda name: (-counts[name], KINDS.index(name)))
    return ", ".join(f"{counts[name]} {name}" for name in order)
