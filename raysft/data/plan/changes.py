"""What differs between the data a run was trained on and the data there is now, in words.

index + plan -> generations -> changes (here) -> refusal or extension at a resume.
`facts` is what a run keeps in its folder of an index and a plan. Comparing two takes seconds for
10 million examples: only files whose bytes differ are looked into, by their records' checksums.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from raysft import patience
from raysft.config.resume import rule_of
from raysft.data import sources as formats
from raysft.data.index.table import Index, IndexedFile
from raysft.data.plan.plan import Plan
from raysft.data.sources.base import Format
from raysft.data.sources.records import OpenFile, Place, fetch
from raysft.errors import UserError
from raysft.json_types import JsonObject

_Key = TypeVar("_Key")
NAMED = 3
"""Files, examples or keys that a message names before it only counts."""

# Settings of a plan that are no key of `data` of the same name.
_KEYS = {"seed": "run.seed", "weights": "data.train", "caps": "data.train"}
_ITS_OWN = ("algorithm",)  # of the planning, no key


def facts(from_epoch: int, index: Index, plan: Plan) -> JsonObject:
    """What a run trains on from an epoch on, as json can write it."""
    return {
        "from_epoch": from_epoch,
        "plan_hash": plan.hash,
        "settings": plan.settings,
        "index": str(index.folder),
        "index_hash": index.hash,
        "encoder": index.encoder,
        "examples": len(index),
        "tasks": index.tasks,
        "sources": [dict(source) for source in index.described],
        "files": [file._asdict() for file in index.files],
        **({"languages": plan.languages} if plan.languages is not None else {}),
        **({"names": dict(index.naming)} if index.naming is not None else {}),
    }


def changed_settings(old: JsonObject, new: JsonObject, fixed: bool = False) -> list[str]:
    """Settings that differ between two `facts`, each with its value now and before.

    fixed: only those that data.extend cannot change.
    """
    found = []
    for key in sorted({*old["settings"], *new["settings"]}):
        now, before = (side["settings"].get(key) for side in (new, old))
        if now == before or (fixed and _extendable(key)):
            continue
        if key == "weights":
            pairs = enumerate(zip(now, before)) if len(now) == len(before) else ()
            found += [
                f"data.train[{i}].weight is {a:g}, was {b:g}" for i, (a, b) in pairs if a != b
            ]
        elif key == "caps":
            found.append("max_examples or max_hours of data.train are others")
        else:
            found.append(f"{_KEYS.get(key, f'data.{key}')} is {now}, was {before}")
    return found


def _extendable(setting: str) -> bool:
    """Whether data.extend may change it: it is part of the data. Others hold for the whole run."""
    return setting not in _ITS_OWN and (
        rule_of(_KEYS.get(setting, f"data.{setting}")).rule == "data"
    )


def changed_data(old: JsonObject, new: JsonObject, index: Index) -> list[str]:
    """What of the data differs between two `facts`; index: the one of `new`."""
    found = []
    if old["index_hash"] == new["index_hash"]:
        langs = [side.get("languages") for side in (old, new)]
        # Else data.temperature is another too, which is said of the settings.
        return ["the languages of its examples are others"] * (
            None not in langs and langs[0] != langs[1]
        )
    if old["encoder"] != new["encoder"]:
        found.append("the model's tokenizer or audio features are others (lengths depend on them)")
    for number, (a, b) in enumerate(zip(new["sources"], old["sources"])):
        found += [
            f"data.train[{number}].{key} is {a[key]}, was {b[key]}"
            for key in ("format", "task")
            if a[key] != b[key]
        ]
    files = _Files(_files(old), _files(new))
    before = _index(old)
    if files.removed:
        went = sum(file.examples for file in files.removed)
        found.append(f"{_named('file', files.removed)} removed ({went:,} examples)")
    if files.added:
        came = sum(file.examples for file in files.added)
        found.append(f"{_named('file', files.added)} added ({came:,} examples)")
    if files.changed:
        went, came = _exchanged(files.changed, before, index)
        what = f"{went:,} examples went, {came:,} came" if before else f"{came:+,} examples"
        found.append(f"{_named('file', [b for _, b in files.changed])} changed ({what})")
    found += _usable(files.judged, before, index)
    if not found:
        found.append("the entries or files of data.train are in another order")
    return found


def overwritten(old: JsonObject, index: Index) -> list[str]:
    """Files that no longer hold the records that the old index reads from them."""
    now = {file.path: (number, file) for number, file in enumerate(index.files)}
    before = _index(old)
    lost: list[str] = []
    for number, file in enumerate(_files(old)):
        path = Path(file.path)
        try:
            # The first that is gone is waited for: so would be all of a mount that is away.
            passing = patience.failing if lost else patience.momentary
            patience.patiently(path.stat, path, passing)
        except FileNotFoundError:
            lost.append(f"{file.path} (gone)")
            continue
        except OSError as error:
            raise patience.away(path, error) from error
        if file.path in now and now[file.path][1].digest != file.digest and before is not None:
            left = _left(before.records(number), index.records(now[file.path][0]))
            form = formats.get(before.described[file.source]["format"])
            if not _hold(form, path, left):
                lost.append(f"{file.path} (changed in place)")
    return lost


def _hold(form: Format, path: Path, records: np.ndarray) -> bool:
    """Whether a file still has these records at their places."""
    places = [Place(0, offset, size) for offset, size, _ in records.tolist()]
    found = fetch(form, OpenFile(path), places)
    return all(zlib.crc32(raw) == crc for raw, crc in zip(found, records[:, 2].tolist()))


def _left(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The records of `old` that are not in `new`; both in the order of their offsets."""
    if not len(new):
        return old
    place = np.minimum(np.searchsorted(new[:, 0], old[:, 0]), len(new) - 1)
    return old[(new[place] != old).any(axis=1)]


class _Files:
    """Files of two indexes, matched by path, else by name and content: files may move."""

    def __init__(self, old: list[IndexedFile], new: list[IndexedFile]) -> None:
        before, after = _numbered(old, _by_path), _numbered(new, _by_path)
        pairs = [(old[before[key]], new[after[key]]) for key in before if key in after]
        gone = [old[number] for key, number in before.items() if key not in after]
        come = [new[number] for key, number in after.items() if key not in before]
        moved, found = _numbered(gone, _by_content), _numbered(come, _by_content)
        pairs += [(gone[moved[key]], come[found[key]]) for key in moved if key in found]
        self.removed = [gone[number] for key, number in moved.items() if key not in found]
        self.added = [come[number] for key, number in found.items() if key not in moved]
        self.changed = [(a, b) for a, b in pairs if a.digest != b.digest]
        # The same bytes: yet other examples can be used, or their clips have other lengths.
        self.judged = [(a, b) for a, b in pairs if a.digest == b.digest and a.part != b.part]


def _by_path(file: IndexedFile) -> str:
    return file.path


def _by_content(file: IndexedFile) -> tuple[str, str]:
    return Path(file.path).stem, file.digest


def _numbered(
    files: list[IndexedFile], key: Callable[[IndexedFile], _Key]
) -> dict[tuple[_Key, int], int]:
    """(key, how many times it was there before) -> number: a file may serve two sources."""
    seen: Counter[_Key] = Counter()
    found = {}
    for number, file in enumerate(files):
        found[key(file), seen[key(file)]] = number
        seen[key(file)] += 1
    return found


def _exchanged(
    changed: list[tuple[IndexedFile, IndexedFile]], before: Index | None, index: Index
) -> tuple[int, int]:
    """Examples that went and came, by their records; only their difference without `before`."""
    if before is None:
        return 0, sum(b.examples - a.examples for a, b in changed)
    went = came = 0
    numbers = [{file: i for i, file in enumerate(side.files)} for side in (before, index)]
    for a, b in changed:
        sides = []
        for side, known, file in ((before, numbers[0], a), (index, numbers[1], b)):
            records = side.records(known[file])
            sides.append(records[:, 1] << 32 | records[:, 2])  # bytes and checksum of each
        values, place = np.unique(np.concatenate(sides), return_inverse=True)
        counts = [
            np.bincount(part, minlength=len(values)) for part in np.split(place, [len(sides[0])])
        ]
        went += int(np.maximum(counts[0] - counts[1], 0).sum())
        came += int(np.maximum(counts[1] - counts[0], 0).sum())
    return went, came


def _usable(
    judged: list[tuple[IndexedFile, IndexedFile]], before: Index | None, index: Index
) -> list[str]:
    """Of files with the same bytes: what became usable, or is no longer."""
    if not judged:
        return []
    where = _named("file", [file for _, file in judged])
    if before is None:
        difference = sum(b.examples - a.examples for a, b in judged)
        return [f"{where}: {difference:+,} examples can be used, by their clips"]
    # Clips of all sources: ids may be there twice.
    then, now = (Counter(item.id for item in side.rejected) for side in (before, index))
    found = []
    for ids, what in ((then - now, "repaired"), (now - then, "no longer usable")):
        if ids:
            count = ids.total()
            found.append(f"{count:,} {_plural('example', count)} {what}: {_first(sorted(ids))}")
    if others := _of_other_lengths(judged, before, index):
        count = len(others)
        clips = f"clips of {count:,} {_plural('example', count)} have"
        found.append(f"{clips} other lengths than when they were indexed: {_first(others)}")
    return found or [f"{where}: lengths are others than when they were indexed"]


def _of_other_lengths(
    judged: list[tuple[IndexedFile, IndexedFile]], before: Index, index: Index
) -> list[str]:
    """Ids of examples that both indexes have, with clips of other lengths."""
    numbers = [{file: i for i, file in enumerate(side.files)} for side in (before, index)]
    found: list[str] = []
    for a, b in judged:
        then, now = before.rows(numbers[0][a]), index.rows(numbers[1][b])
        _, mine, theirs = np.intersect1d(
            before.records(numbers[0][a])[:, 0],
            index.records(numbers[1][b])[:, 0],
            assume_unique=True,
            return_indices=True,
        )
        other = before.seconds[then][mine] != index.seconds[now][theirs]
        rows = theirs[np.flatnonzero(other)] + now.start
        # Ids are read from the data file: those that are named, and as many as there are.
        found += index.ids(rows[: NAMED + 1]) + [""] * max(0, len(rows) - NAMED - 1)
    return found


def _files(side: JsonObject) -> list[IndexedFile]:
    return [IndexedFile(**file) for file in side["files"]]


def _index(side: JsonObject) -> Index | None:
    """The index of `facts`, where it is still there: a message can then say more."""
    meta = Path(side["index"], "meta.json")
    if not patience.known(meta.exists, meta):
        return None
    try:
        return Index.load(side["index"])
    except UserError:
        return None


def _named(noun: str, files: Iterable[IndexedFile]) -> str:
    names = sorted({file.path for file in files})
    return f"{len(names)} {_plural(noun, len(names))} ({_first(names)})"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _first(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
