"""What examples are called in ledger, quarantine and predictions: no two of an index alike.

    train:7           the record in line 7 of train.jsonl, which has no id of its own
    en/train:7        the same, where there are several files of that name: as much of the path as
                      tells them apart
    train[asr]:7      the same, where two sources read one file
    rec1              a record with an id
    rec1@train:7      the same, where another has that id too, or might be called so by its place

What a file is called here is its label. `@` and `%` are written %40 and %25 in labels, so that a
place can be told from an id. Repeated ids are found by 64 bits of their hash, which is all that is
kept of ids while an index is built; of two ids that share a hash by chance both get their place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import PurePath

import numpy as np

Entry = tuple[str, str]
"""Path of a data file, and name of the source that reads it."""

Naming = tuple[tuple[int, str], ...]
"""Labels of an index's files, by number, where they are not the name without its ending."""

_PLACE = re.compile(r"(.*):[0-9]+", re.DOTALL)
_ROWS = 1 << 20


def hashed(name: str) -> int:
    """Of an id: 64 bits, never 0."""
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def repeated(hashes: np.ndarray) -> np.ndarray:
    """bool [N]: which of uint64 [N] occur more than once; 0, no id, never does. Costs 0.1 us an
    example, and 8 bytes."""
    ordered = np.sort(hashes[hashes != 0])
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    found = np.zeros(len(hashes), bool)
    for start in range(0, len(hashes) if len(twice) else 0, _ROWS):
        some = hashes[start : start + _ROWS]
        place = np.minimum(np.searchsorted(twice, some), len(twice) - 1)
        found[start : start + _ROWS] = twice[place] == some
    return found


def name_of(name: str, default: str, place: str, again: bool, labels: frozenset[str]) -> str:
    """What an example is called.

    name: its id; default: what it would be without one of its own; place: label and line; again:
    whether another has that id. labels: of all files.
    """
    if name == default:
        return place
    if not again:
        looks = _PLACE.fullmatch(name.rpartition("@")[2])
        if looks is None or looks[1] not in labels:
            return name
    return f"{name}@{place}"


def labels(entries: Sequence[Entry], earlier: Mapping[Entry, str] | None = None) -> list[str]:
    """The label of each entry: no two alike.

    earlier: those that entries of the run had before; they keep them, and no other gets them.
    """
    kept = dict(earlier or {})
    sources: dict[str, set[str]] = {}
    for path, source in [*kept, *entries]:
        sources.setdefault(path, set()).add(source)
    bases = _bases(list(sources))
    taken = set(kept.values())
    found = []
    for path, source in entries:
        if (path, source) not in kept:
            label = bases[path]
            if len(sources[path]) > 1:
                label += f"[{_quoted(source)}]"
            while label in taken:
                label += "'"
            taken.add(label)
            kept[path, source] = label
        found.append(kept[path, source])
    return found


def naming(entries: Sequence[Entry], found: Sequence[str]) -> Naming:
    """Labels `found` of entries, those left out that say themselves."""
    return tuple(
        (number, label)
        for number, ((path, _), label) in enumerate(zip(entries, found))
        if label != _quoted(PurePath(path).stem)
    )


def named(paths: Sequence[str], given: Naming) -> list[str]:
    """The inverse of `naming`: the labels of all files."""
    found = [_quoted(PurePath(path).stem) for path in paths]
    for number, label in given:
        found[number] = label
    return found


def _bases(paths: list[str]) -> dict[str, str]:
    """Of each path: its name without the ending, after as many folders as tell it from the others;
    with its ending where that alone does."""
    found: dict[str, str] = {}
    for whole in (False, True):
        left = [path for path in paths if path not in found]
        found.update(_told_apart(left, whole))
    return found | {path: _quoted(path) for path in paths if path not in found}


def _told_apart(paths: list[str], whole: bool) -> dict[str, str]:
    groups: dict[str, list[tuple[str, Iterator[str]]]] = {}
    for path in paths:
        name = PurePath(path).name if whole else PurePath(path).stem
        groups.setdefault(name, []).append((path, _tails(path, name)))
    found = {}
    for group in groups.values():
        while group:
            tails = [next(tail, None) for _, tail in group]
            counts = Counter(tails)
            for (path, _), tail in zip(group, tails):
                if tail is not None and counts[tail] == 1:
                    found[path] = _quoted(tail)
            group = [
                item
                for item, tail in zip(group, tails)
                if tail is not None and item[0] not in found
            ]
    return found


def _tails(path: str, name: str) -> Iterator[str]:
    """name, folder/name, ... of a path; the root is none of them."""
    yield name
    for folder in reversed(PurePath(path).parent.parts[1:]):
        name = f"{folder}/{name}"
        yield name


def _quoted(text: str) -> str:
    return text.replace("%", "%25").replace("@", "%40")
