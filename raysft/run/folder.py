"""A run's folder: what it is created with, and whether a config may continue it.

config.yaml   the config as resolved, the versions of the packages it ran with, the run's id, and
              which base it stands upon (see `run.identity`)
owner.json, owner/   who may write here: see `run.ownership`
chat_template.jinja   the template of its prompts, as it was when the run began
augment.json  the recordings with which its clips are varied (`data.augment`)
evaluations/  folders of jobs/evaluate.py, each with its own config.yaml
experts.json  what model.moe.experts: auto means in this run, with what was measured
weights.json  which checkpoint a run with checkpoint.resume=weights_only begins with
earlier_N/    the runs that were in this folder before such a beginning
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path

import yaml

from raysft import paths, plugins, remarks
from raysft.config import Config, changed_keys, places, precision, to_tree, to_yaml
from raysft.config.load import apply_override, read_tree, validate
from raysft.config.marks import Rule
from raysft.config.resume import rule_of, rules
from raysft.data.clips import recordings
from raysft.data.encode import TEMPLATE
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.patience import patient, patiently
from raysft.run import identity, ownership, place, stages, threads
from raysft.run.catalogue import Catalogue, Saved
from raysft.run.ownership import ANYONE, Permit
from raysft.run.storage import open_storage, write_whole
from raysft.run.versions import versions

log = logging.getLogger(__name__)


def run_folder(config: Config) -> Path:
    """`run.storage_path/run.name`, absolute: workers may have another working directory."""
    return Path(paths.absolute(config.run.storage_path)) / config.run.name


@patient
def open_run(config: Config, permit: Permit = ANYONE) -> Path:
    """Create the run's folder, or check that the one there is of this config. Returns it.

    config: as `resolve` gives it. permit: asked before anything is written. Raises UserError where
    the folder holds another run, is not a run's, or cannot be written.
    """
    check_run(config)
    folder = run_folder(config)
    try:
        patiently(partial(folder.mkdir, parents=True, exist_ok=True), folder)
    except OSError as error:
        raise UserError(
            f"run.storage_path: {folder} cannot be made: {error.strerror or error}"
        ) from None
    permit.require()
    known = (folder / "config.yaml").is_file()
    if _begins_anew(config, folder):
        _set_aside(config, folder, permit)
    elif known and base_of(folder) is None and identity.of(config.model) is not None:
        log.warning(
            "%s: this run has not recorded which base it began with: from now on it is what "
            "model.path %s holds now",
            folder,
            config.model.path,
        )
    before = _before(config)
    if before is not None and (other := threads.difference(config, before)) is not None:
        log.warning("%s", other)
    if not is_trained(config):  # nothing stands upon its prompts: they are those of this start
        for name in (TEMPLATE, recordings.FILE):
            (folder / name).unlink(missing_ok=True)
    permit.require()
    write_config(config, folder, run_id(folder) or place.new_id())
    return folder


@patient
def is_trained(config: Config) -> bool:
    """Whether the run of this config has a checkpoint, from which it goes on."""
    return bool(Catalogue.of(config.checkpoint, run_folder(config)).committed())


def new_evaluation(run: Path, step: int, config: Config) -> Path:
    """A new folder below `run` for an evaluation of `step`, with the config it is done with."""
    sources = "_".join(source.name or Path(source.path).stem for source in config.data.eval)
    name = f"step_{step}_" + re.sub(r"[^-.\w]+", "_", sources)[:60]
    number = 1
    while True:
        folder = run / "evaluations" / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be made: {error.strerror or error}") from error
        write_config(config, folder)
        return folder


def write_config(config: Config, folder: Path, run: str | None = None) -> None:
    """config.yaml, with the versions of the packages it runs with, the run's id (None: what it has;
    an evaluation has none), and its base."""
    beside: JsonObject = {"versions": versions()}
    if (kept := run or run_id(folder)) is not None:
        beside["id"] = kept
    if (base := identity.of(config.model)) is not None:
        beside["base"] = base
    _write(folder / "config.yaml", to_yaml(config) + yaml.safe_dump(beside, sort_keys=False))


@patient
def resolve(config: Config, folder: Path) -> Config:
    """`config` with what only its run in `folder` or the hub knows: the number that
    data.tokens_per_batch: auto means in this run, the threads and the precision it began with, and
    the commit that a hub id in model.path means: the one that the run began with, else the newest.
    Raises UserError where the hub has no such model.

    Resolved again it is the same, unless another start has written more meanwhile.
    """
    before = read_config(folder) if (folder / "config.yaml").is_file() else None
    begun = None if before is None or _begins_anew(config, folder) else before
    if config.data.tokens_per_batch == "auto" and begun is not None:
        budget = begun.data.tokens_per_batch
        config = config if budget == "auto" else with_budget(config, budget)
    model, commit = config.model, None
    if model.revision is None and before is not None and before.model.path == model.path:
        commit = before.model.revision
    commit = commit or identity.commit_of(model)
    if commit is not None:
        model = model.model_copy(update={"revision": commit})
        config = config.model_copy(update={"model": model})
    if begun is None:
        return config
    return threads.as_begun(precision.as_begun(config, begun), begun)


def _before(config: Config) -> Config | None:
    """What the run that `config` continues was last started with; None: there is none."""
    folder = run_folder(config)
    if not (folder / "config.yaml").is_file() or _begins_anew(config, folder):
        return None
    return read_config(folder)


def with_budget(config: Config, budget: int) -> Config:
    """`config` with its number: what the run's config.yaml holds."""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"tokens_per_batch": budget}),
            "parallel": config.parallel.model_copy(update={"memory_gb": None}),
        }
    )


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _begins_anew(config: Config, folder: Path) -> bool:
    """Whether this start takes a run's weights and nothing else: only the first with that key
    does, the same command again continues."""
    if config.checkpoint.resume != "weights_only":
        return False
    if not (folder / "config.yaml").is_file():
        return not _was_set_aside(folder)
    return read_config(folder).checkpoint.resume != "weights_only"


def _was_set_aside(folder: Path) -> bool:
    """Whether all of the run before was moved, and only the new config was not written yet."""
    return (folder / "weights.json").is_file() and not (folder / "config.yaml").exists()


EXPERTS = "experts.json"

# What belongs to the run so far, and not to one that begins anew in its folder.
_ITS_OWN = (
    "checkpoints",
    "ledger",
    "tensorboard",
    "wandb",
    "loggers.json",
    "predictions",
    "evaluations",
    "metrics.jsonl",
    "eval.jsonl",
    "evaluations.json",
    "quarantine.jsonl",
    "events.jsonl",
    "plan.json",
    "epochs.json",
    EXPERTS,
    remarks.LOG,
    TEMPLATE,
    recordings.FILE,
    "weights.json",
    "report.png",
    "report.html",
)


def _set_aside(config: Config, folder: Path, permit: Permit) -> None:
    """Move the run so far to earlier_N, and write down which weights the new one begins with.
    Done again from any point at which it was interrupted."""
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"checkpoint.resume: weights_only, but {folder} holds no run to take weights from; "
            "name that run, or give exported weights as model.path"
        )
    before = read_config(folder)
    kept = [key for key, mark in rules().items() if mark.weights and key.startswith("peft.")]
    for key in kept:
        had, wanted = attrgetter(key)(before), attrgetter(key)(config)
        if had != wanted:
            raise UserError(
                f"checkpoint.resume: weights_only, but {key} is {wanted} and the weights of "
                f"{folder} are of {key} {had}; export that run (--merge, or its adapter) and "
                "give it as model.path (or peft.path) to a new run"
            )
    old = before.checkpoint
    if old.path is not None and old.path == config.checkpoint.path:
        raise UserError(
            f"checkpoint.path: {old.path} holds the checkpoints of the run so far; with "
            "checkpoint.resume=weights_only name another place for the new ones"
        )
    number = 1
    while (folder / f"earlier_{number}" / "config.yaml").exists():
        number += 1
    aside = folder / f"earlier_{number}"
    moved = aside if old.path is None and (aside / "checkpoints").exists() else folder
    saved, _ = Catalogue.of(old, moved).newest(Saved.damage)  # once: read to the last byte
    if saved is None:
        raise UserError(
            f"checkpoint.resume: weights_only, but {folder} has no checkpoint to take them from"
        )
    permit.require()  # reading the checkpoint may have taken a while
    aside.mkdir(exist_ok=True)
    for name in _ITS_OWN:
        if (folder / name).exists() and not (aside / name).exists():
            os.replace(folder / name, aside / name)
    facts = {"run": aside.name, "path": old.path, "step": saved.step}
    _write(folder / "weights.json", json.dumps(facts))
    os.replace(folder / "config.yaml", aside / "config.yaml")


@patient
def initial_weights(folder: Path) -> Saved | None:
    """The checkpoint whose weights the run in `folder` begins with; None: as model.* says."""
    written = folder / "weights.json"
    if not written.is_file():
        return None
    facts = json.loads(written.read_bytes())
    whose = folder if facts["path"] else folder / facts["run"]
    storage = open_storage(whose, facts["path"])
    return Saved(facts["step"], storage)


@patient
def check_run(config: Config) -> None:
    """Raises UserError if the run's folder is there and this config may not continue it.

    config: as `resolve` gives it.
    """
    folder = run_folder(config)
    known = (folder / "config.yaml").is_file()
    if _begins_anew(config, folder):
        if not known or read_config(folder).checkpoint.path != config.checkpoint.path:
            place.refuse_other(config.checkpoint, folder, None, began=False)
    else:
        place.refuse_other(config.checkpoint, folder, run_id(folder), began=known)
    if known:
        _check_whole(config, folder)
        _check_same(config, folder)
    elif folder.is_dir() and _holds_other(folder) and not _was_set_aside(folder):
        raise UserError(
            f"{folder}: is there and holds no config.yaml, so it is not the folder of a run; "
            "choose another run.name or run.storage_path"
        )


def _holds_other(folder: Path) -> bool:
    """Whether there is more in it than what a start leaves that ended before its config.yaml, and
    no config.yaml: another start may be about to write it."""
    ours = (ownership.POINTER, ownership.FOLDER)
    names = [path.name for path in folder.iterdir()]
    other = [name for name in names if name not in ours and not name.startswith(_UNFINISHED)]
    return bool(other) and not (folder / "config.yaml").is_file()


_UNFINISHED = (f".{ownership.POINTER}.", ".config.yaml.")  # see `write_whole`


def _check_whole(config: Config, folder: Path) -> None:
    """Refuse a run that was half set aside: without its checkpoints it would begin at step 0."""
    halves = [path for path in folder.glob("earlier_*") if not (path / "config.yaml").exists()]
    if halves and not _begins_anew(config, folder):
        raise UserError(
            f"{folder}: a start with checkpoint.resume=weights_only was interrupted while it moved "
            f"the run to {halves[0].name}; give that command again"
        )


def reopen(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of the run in `folder` with overrides, wherever the folder has moved to."""
    tree = to_tree(read_config(folder))
    here = folder.absolute()
    tree["run"] = {**tree["run"], "storage_path": str(here.parent), "name": here.name}
    for override in overrides:
        apply_override(tree, override)
    return validate(tree, str(folder / "config.yaml"))


@patient
def read_config(folder: Path) -> Config:
    """The config a run was last started with. Raises UserError where `folder` is not a run's."""
    written = folder / "config.yaml"
    if not written.is_file():
        stages.refuse_folder(folder)
        raise UserError(f"{folder}: no run is here (no config.yaml); name a run's folder")
    return validate(_read_tree(written), str(written))


@patient
def load_plugins(folder: Path) -> None:
    """Load what the run in `folder` names as its plugins, whatever else its config.yaml says: that
    of an older version may not be valid any more. Raises UserError where one cannot be imported."""
    written = folder / "config.yaml"
    try:
        plugins.load(_read_tree(written).get("plugins") or [])
    except UserError as error:
        raise UserError(f"{written}: {error}") from error


def _read_tree(written: Path) -> JsonObject:
    tree = read_tree(written.read_text(encoding="utf-8"), str(written))
    for key in ("versions", "id", "base"):
        tree.pop(key, None)
    return tree


@patient
def run_id(folder: Path) -> str | None:
    """The id of the run in `folder`; None where there is none, or one from before runs had ids."""
    written = folder / "config.yaml"
    if not written.is_file():
        return None
    found = read_tree(written.read_text(encoding="utf-8"), str(written)).get("id")
    return found if isinstance(found, str) else None


@patient
def base_of(folder: Path) -> dict[str, str] | None:
    """The base of the run in `folder`, as its config.yaml has it; None where it says nothing."""
    written = folder / "config.yaml"
    return base_in(written.read_text(encoding="utf-8")) if written.is_file() else None


def base_in(text: str) -> dict[str, str] | None:
    """The base that the text of a config.yaml names, if it does: what `write_config` put last."""
    _, found, section = text.rpartition("\nbase:\n")
    return read_tree(section, "config.yaml") if found else None


def check_base(config: Config, folder: Path) -> None:
    """Raises UserError where the weights at model.path are not those that the run in `folder`
    began with."""
    identity.refuse_other(str(folder), config.model, base_of(folder), _BASE_REMEDY)


_BASE_REMEDY = (
    "put that one back to continue, or choose another run.name to train anew; what was trained "
    "means nothing upon other weights"
)


def _check_same(config: Config, folder: Path) -> None:
    if config.checkpoint.resume == "never":
        raise UserError(
            f"{folder}: a run is there and checkpoint.resume is never; choose another run.name, "
            "delete the folder, or set checkpoint.resume=auto to continue it"
        )
    # With a default for each key that there was not yet when the run began.
    before = read_config(folder)
    new = config.model_dump(mode="json")
    old = places.keep_same(before.model_dump(mode="json"), new)
    recorded = base_of(folder)
    if _begins_anew(config, folder):
        changed = changed_keys({"model": old["model"]}, {"model": new["model"]})
        changed = [change for change in changed if rule_of(change.key).weights]
        if config.peft.method != "none":  # else the checkpoint has all weights
            check_base(config, folder)
        if changed:
            raise UserError(
                f"{folder}: its weights are of another model: {'; '.join(map(str, changed))}. Set "
                "these back to begin with its weights (checkpoint.resume=weights_only)"
            )
        return
    moved = old["checkpoint"]["path"] == config.checkpoint.path
    where = config.checkpoint if moved else before.checkpoint
    committed = Catalogue.of(where, folder).committed()
    allowed: set[Rule] = {"free", "data"}  # data: held against what was trained on by `history`
    if _length_may_change(config, committed):
        allowed.add("length")
    if recorded is not None and recorded == identity.of(config.model):
        allowed.add("base")
    changed = [
        change for change in changed_keys(old, new) if rule_of(change.key).rule not in allowed
    ]
    saved = bool(committed)
    if saved and not changed:
        check_base(config, folder)
    if changed and saved:
        raise UserError(
            f"{folder}: holds a run of another config: {'; '.join(map(str, changed))}. Set these "
            "back to continue it, choose another run.name to train anew, set checkpoint.resume="
            "weights_only to begin anew with its weights, or delete the folder"
        )


def _length_may_change(config: Config, committed: Sequence[Saved]) -> bool:
    """Whether the number of steps may be another: decided where it is known, from what the newest
    checkpoint says it was (`schedule.another_length`). Older ones say nothing: then only where no
    rate depends on it."""
    if config.peft.method == "adalora":  # its ranks follow the number of all steps
        return False
    absolute = config.optim.warmup >= 1 or not config.optim.warmup
    if config.optim.schedule == "constant" and absolute:
        return True
    newest = max(committed, key=lambda saved: saved.step, default=None)
    try:
        return newest is not None and "total_steps" in newest.meta()
    except UserError:  # damaged: the one before is used
        return False


def versions_of(folder: Path) -> dict[str, str]:
    """The packages that the run in `folder` was last started with, as its config.yaml has them."""
    written = folder / "config.yaml"
    found = read_tree(written.read_text(encoding="utf-8"), str(written)).get("versions")
    return found if isinstance(found, dict) else {}
