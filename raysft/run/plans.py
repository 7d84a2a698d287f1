"""plan.json: what a run has trained on and from which epoch, and what a changed corpus means to it.

In a run's folder, beside config.yaml: a list of `changes.facts`, oldest first. At a start the data
there is now is held against the newest of them. Equal: the run goes on. Changed: it is refused
with what changed and what the choices are, or, with data.extend, used from the next epoch on. A run
keeps the version of planning it began with, for new data too.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

from raysft import patience
from raysft.config.schema import Data
from raysft.data import names
from raysft.data.index.table import Index
from raysft.data.names import Naming
from raysft.data.plan.changes import changed_data, changed_settings, facts, overwritten
from raysft.data.plan.generations import Generation, Generations
from raysft.data.plan.plan import ALGORITHMS, Cursor, Plan
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.run.folder import run_id
from raysft.run.ownership import ANYONE, Permit
from raysft.run.storage import write_whole

log = logging.getLogger(__name__)

NAME = "plan.json"
_KNOWN = " and ".join([", ".join(map(str, ALGORITHMS[:-1])), str(ALGORITHMS[-1])])


def load(run: Path) -> Generations:
    """The plan of the run in folder `run`. Raises UserError where it holds none."""
    return _generations(run, _read(run))


def identity(run: Path) -> str:
    """What tells this run from any other: the id in its config.yaml; of one from before runs had
    ids, the hash of its first plan."""
    return run_id(run) or _read(run)[0]["plan_hash"]


def chained(run: Path) -> bool:
    """Whether the run's ledger was chained from its first line on."""
    return "names" in _read(run)[0]


def places(run: Path) -> list[tuple[str, int, Naming | None]]:
    """Of each generation's index folder, examples, and what they are called: what
    `generations.open_index` takes."""
    return [(item["index"], item["examples"], _naming(item)) for item in _read(run)]


def _naming(item: JsonObject) -> Naming | None:
    """What a generation calls its examples; None: by their ids, as runs did that began before
    these were made unique."""
    if "names" not in item:
        return None
    return tuple((int(number), label) for number, label in item["names"].items())


def tasks(run: Path) -> list[str]:
    """Tasks of all generations; those of older ones first, so that their numbers stay."""
    return list(dict.fromkeys(task for item in _read(run) for task in item["tasks"]))


def follow(
    run: Path,
    index: Index,
    data: Data,
    seed: int,
    cursor: Cursor | None,
    permit: Permit = ANYONE,
) -> Generations:
    """The plan with which the run goes on from `cursor` (None: it starts), given the data now.

    Writes plan.json where that changes it. Raises UserError where the data, or a setting that the
    plan depends on, is not what the run trained on: always for a setting; for data unless
    data.extend. Starting again with the same data, with or without data.extend, changes nothing.
    permit: asked before it is written.
    """
    plan = _current(run, index, data, seed, cursor)
    now = facts(0, index, plan)
    if cursor is None or not patience.patiently((run / NAME).exists, run / NAME):
        if cursor is not None:
            plan.steps(cursor)  # a run from before there was a plan.json: refuses other data
            now.pop("names", None)  # what it has recorded are ids as they are
        permit.require()
        _write(run, [now])
        return _generations(run, [now], plan)
    known = _redated(run, _read(run), cursor, plan)
    if known[-1]["plan_hash"] != now["plan_hash"]:
        if not data.extend and _same_files(known[-1], now):
            log.warning(
                "%s: the data files are as they were, but what they hold is not: %s. This run "
                "keeps to what it planned, and quarantines a clip that is longer or much shorter "
                "than that; data.extend=true plans with them from the next epoch on",
                run,
                "; ".join(changed_data(known[-1], now, index)),
            )
        else:
            known = _extended(run, known, now, index, data, cursor)
    for item in known:
        beside = index.folder.with_name(Path(item["index"]).name)
        if item["plan_hash"] == now["plan_hash"]:  # the same data, perhaps in another place
            item.update({key: now[key] for key in ("index", "sources", "files")})
        elif not _there(item["index"]) and _there(beside):  # moved with the others
            item["index"] = str(beside)
    permit.require()
    _write(run, known)
    found = _generations(run, known, plan)
    found.steps(cursor)  # refuses a cursor of neither
    return found


@patience.patient
def _current(run: Path, index: Index, data: Data, seed: int, cursor: Cursor | None) -> Plan:
    """The plan of the data there is now, by the planning that the run keeps."""
    if cursor is None:
        return Plan.of(index, data, seed)
    if (run / NAME).exists():
        return Plan.of(index, data, seed, _known(run, _read(run)[-1]))
    # A run from before there was a plan.json: its cursor tells.
    plans = [Plan.of(index, data, seed, number) for number in sorted(ALGORITHMS, reverse=True)]
    return next((plan for plan in plans if plan.owns(cursor)), plans[0])


def _known(run: Path, item: JsonObject) -> int:
    """The planning of a generation."""
    number = item["settings"]["algorithm"]
    if number not in ALGORITHMS:
        raise UserError(
            f"{run / NAME}: this run is planned by version {number} of raysft's planning, and this "
            f"raysft knows {_KNOWN}; continue it with the raysft it "
            f"began with, or {_ANEW}"
        )
    return number


def _redated(run: Path, known: list[JsonObject], cursor: Cursor, plan: Plan) -> list[JsonObject]:
    """The generations, where the run has gone beyond the epoch that one of them was to begin with
    on the plan before it: that one begins where the run stands. Two drivers at once did that, in
    versions that let them."""
    made = [n for n, item in enumerate(known) if item["plan_hash"] == cursor.plan_hash]
    owner = max((n for n in made if known[n]["from_epoch"] <= cursor.epoch), default=len(known))
    if not any(item["from_epoch"] <= cursor.epoch for item in known[owner + 1 :]):
        return known
    first = _generations(run, known, plan).next_epoch(cursor)
    late = [item for item in known[owner + 1 :] if item["from_epoch"] < first]
    if not late:
        return known
    log.warning(
        "%s: its data was to be new from epoch %d on, but was used as it was up to epoch %d: it is "
        "new from epoch %d on",
        *(run / NAME, late[0]["from_epoch"], first - 1, first),
    )
    after = [item for item in known[owner + 1 :] if item["from_epoch"] > first]
    return [*known[: owner + 1], {**late[-1], "from_epoch": first}, *after]


def _same_files(old: JsonObject, new: JsonObject) -> bool:
    """Whether only clips can have changed: the same bytes in the same files, read the same way."""
    if old["encoder"] != new["encoder"] or changed_settings(old, new):
        return False
    before, now = (
        [(file["digest"], file["source"]) for file in side["files"]] for side in (old, new)
    )
    kinds = [[(s["format"], s["task"]) for s in side["sources"]] for side in (old, new)]
    return before == now and kinds[0] == kinds[1]


def _extended(
    run: Path,
    known: list[JsonObject],
    now: JsonObject,
    index: Index,
    data: Data,
    cursor: Cursor,
) -> list[JsonObject]:
    """The generations once the data there is now is the newest one's. Raises UserError."""
    last = known[-1]
    fixed = changed_settings(last, now, fixed=True)
    if last["encoder"] != now["encoder"]:
        fixed += changed_data(last, now, index)[:1]
    if fixed:
        raise UserError(
            f"{run}: this run cannot go on as its plan depends on what has changed: "
            f"{'; '.join(fixed)}. Set it back to continue, {_ANEW}"
        )
    changed = [*changed_data(last, now, index), *changed_settings(last, now)]
    if not data.extend:
        raise UserError(
            f"{run}: the training data is not what this run trains on: {'; '.join(changed)}. "
            "Put the data back to continue; set data.extend=true to finish the epoch under way on "
            f"the old data and go on with the new; {_ANEW}"
        )
    before = _generations(run, known)
    epoch = before.next_epoch(cursor)
    # A generation whose first epoch has not begun is replaced.
    begun = [item for item in known if item["from_epoch"] < epoch]
    if begun and epoch > cursor.epoch and (lost := overwritten(begun[-1], index)):
        raise UserError(
            f"{run}: data.extend finishes epoch {cursor.epoch} on the data it began with, and "
            f"that has been overwritten: {', '.join(lost[:3])}, {len(lost)} in all. Put it back "
            "and add new examples as new files or at the end of old ones; the next epoch can do "
            f"without it. Or {_ANEW}"
        )
    if not begun or begun[-1]["plan_hash"] != now["plan_hash"]:
        labels = names.labels(index.entries, _labels(begun))
        named = dict(names.naming(index.entries, labels))
        begun.append({**now, "from_epoch": epoch, "names": named})
    log.warning("data.extend: from epoch %d on the data is new: %s", epoch, "; ".join(changed))
    return begun


def _labels(known: list[JsonObject]) -> dict[names.Entry, str]:
    """What the files of these generations are called."""
    found: dict[names.Entry, str] = {}
    for item in known:
        naming = _naming(item)
        if naming is not None:
            labels = names.named([file["path"] for file in item["files"]], naming)
            for file, label in zip(item["files"], labels):
                found[file["path"], item["sources"][file["source"]]["name"]] = label
    return found


_ANEW = (
    "choose another run.name to train anew; or set checkpoint.resume=weights_only to start anew "
    "from this run's weights"
)


def _generations(run: Path, known: list[JsonObject], newest: Plan | None = None) -> Generations:
    return Generations(
        [
            Generation(item["from_epoch"], item["examples"], partial(_plan, run, item, newest))
            for item in known
        ]
    )


def _plan(run: Path, item: JsonObject, made: Plan | None) -> Plan:
    if made is not None and made.hash == item["plan_hash"]:
        return made
    settings = {
        key: value
        for key, value in item["settings"].items()
        if key not in ("algorithm", "weights", "seed", "caps")
    }
    try:
        index = Index.load(item["index"])
    except UserError as error:
        raise UserError(
            f"{run / NAME}: from epoch {item['from_epoch']} on the run was trained on the index in "
            f"{item['index']}, which cannot be read any more ({error}); restore that folder, or "
            f"{_ANEW}"
        ) from error
    plan = Plan.of(index, Data(**settings), item["settings"]["seed"], _known(run, item))
    if plan.hash != item["plan_hash"]:
        raise UserError(
            f"{run / NAME}: the plan from epoch {item['from_epoch']} on comes out another now: its "
            f"index in {item['index']} was altered; restore it, or {_ANEW}"
        )
    return plan


def _there(index: str | Path) -> bool:
    return patience.known(Path(index).exists, index)


def _read(run: Path) -> list[JsonObject]:
    path = run / NAME
    try:
        found = json.loads(patience.patiently(path.read_bytes, path))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; a run writes it at its start: "
            "name a run's folder"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); restore it, or {_ANEW}") from error
    if not found or not isinstance(found, list):
        raise UserError(f"{path}: is damaged (not a list of generations); restore it, or {_ANEW}")
    return found


def _write(run: Path, known: list[JsonObject]) -> None:
    path = run / NAME
    content = json.dumps(known, indent=1).encode()

    def put() -> None:
        if not path.exists() or path.read_bytes() != content:
            write_whole(path, content)

    try:
        patience.patiently(put, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
