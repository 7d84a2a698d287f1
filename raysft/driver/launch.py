"""Config -> a running job: index and plan on the driver, Ray Train workers, one outcome.

prepare   encoder, index, plan (see `prepare`)
train     TorchTrainer with restarts; every worker runs `train.loop.train` on its lanes
outcome   where the run's folder is and what the last evaluation said
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from raysft.config import Config
from raysft.config.schedule import another_length
from raysft.config.strategies import traits_of
from raysft.data.example import Quarantined
from raysft.data.index.build import Index
from raysft.data.plan.plan import Cursor
from raysft.data.quarantine import Known
from raysft.driver import (
    budget,
    growing,
    precision,
    preflight,
    preview,
    readers,
    workers,
)
from raysft.driver.beside import Beside, alone
from raysft.driver.placed import place
from raysft.driver.preflight import Prepared
from raysft.driver.shares import Shares
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.loggers import check as loggers
from raysft.page.live import with_page
from raysft.run import judged, plans
from raysft.run.catalogue import Catalogue, Saved, unreadable
from raysft.run.evaluations import Evaluations, Measure, choose, left, table
from raysft.run.folder import (
    check_run,
    new_evaluation,
    open_run,
    resolve,
    run_folder,
    with_budget,
    write_config,
)
from raysft.run.lines import Lines, read_lines, stream_lines
from raysft.run.ownership import ANYONE, Ownership, Permit, Process
from raysft.run.threads import with_threads
from raysft.train.metrics import quarantine_line

if TYPE_CHECKING:
    from ray.actor import ActorHandle

log = logging.getLogger(__name__)

Progress = Callable[[JsonObject], None]


@dataclass
class Outcome:
    """How a run, or an evaluation, ended."""

    folder: Path
    step: int
    evaluation: JsonObject  # the last line of eval.jsonl; {}: there is none
    shown: bool = False  # the user has seen it
    what: str = "run"

    def describe(self) -> str:
        """What the user sees at the end."""
        folder = f"{self.what} folder: {self.folder} (step {self.step})"
        if not self.evaluation or self.shown:
            return folder
        return f"evaluation at step {self.evaluation['step']}\n{table(self.evaluation)}\n{folder}"


def run(
    config: Config, progress: Progress, leave: threading.Event | None = None, until: int = 0
) -> Outcome:
    """Train (or continue) the run, which this process owns meanwhile: see `run.ownership`.

    config: as it was asked for: what `resolve` makes of it is certain only once the folder is this
    start's. leave: once it is set, the workers save and leave, and this returns. until: a step at
    which they do so by themselves; 0: the last. Raises UserError where another start holds it.
    Ctrl-C and SIGTERM: saves, then raises KeyboardInterrupt or SystemExit.
    """
    folder = run_folder(config)
    check_run(resolve(config, folder))  # nothing is left in a folder that is not for this run

    say = preflight.saying(progress)

    with Ownership.take(folder, say) as owner:
        config = resolve(config, folder)
        start = Start(open_run(config, owner), owner, leave=leave, until=until)
        try:
            return _run(config, start, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(start.left(config)) from None
        except SystemExit:
            print(start.left(config), file=sys.stderr, flush=True)
            raise


def evaluate(config: Config, run: Path, progress: Progress, step: str = "last") -> Outcome:
    """Evaluate a checkpoint of the run in `run`, as `config` says, into a folder of its own below
    it; nothing else there is written. config: as `preflight.check_evaluation` returns it. step: a
    step, `best` or `last`.

    Raises UserError where there is no such checkpoint, or nothing to evaluate it on.
    """
    config = alone(config)
    _check_cluster(config)
    saved, skipped = choose(run, config.checkpoint, step, unreadable)
    for reason in skipped:
        log.warning("skipped: %s", reason)

    say = preflight.saying(progress)

    say(f"evaluating step {saved.step} of {run}")
    folder = new_evaluation(run, saved.step, config)
    try:
        encoder, index = preflight.read_eval(config, run, folder, say)
        _record_rejected(folder, index.rejected)
        settings = {
            "eval": (index.place,),
            "encoder": ray.put(encoder),
            "evaluated": {"run": str(run), "step": saved.step},
        }
        _wait_for_nodes(config, say)
        workers.run(config, folder, settings, saved.step, progress)
        (line,) = read_lines(folder / "eval.jsonl")
        judged.write(folder / "predictions.jsonl", folder / judged.FOLDER)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; nothing was recorded, the run is as it was") from None
    finally:
        shutil.rmtree(folder / "ray_train", ignore_errors=True)
        if not (folder / "eval.jsonl").exists():  # it holds no figures
            shutil.rmtree(folder, ignore_errors=True)
    return Outcome(folder, saved.step, line, what="evaluation")


def dry_run(config: Config, progress: Progress, show: int = 0, colours: bool = False) -> str:
    """What a run would do on this cluster, as text; see `preview.dry_run`.

    config: as `preflight.check` returns it.
    """
    gpu = growing.expected(config) or Shares.of(config).gpu
    config, _ = precision.settled(config, gpu)
    placed = None
    if gpu and traits_of(config.parallel.strategy).replicates:
        placed = place(config.parallel.min_workers)
    return preview.dry_run(config, preflight.saying(progress), show, colours, placed)


@dataclass
class Start:
    """One submission: since when, of what; and where it leaves the run when it is interrupted."""

    folder: Path
    owner: Ownership | None = None
    at: float = field(default_factory=time.time)
    total_steps: int | None = None  # once there is a plan
    leave: threading.Event | None = None  # see `run`
    until: int = 0

    def left(self, config: Config) -> str:
        """Where the run stands, and what the same command does then."""
        try:
            saved, _ = Catalogue.of(config.checkpoint, self.folder).newest()
        except (OSError, UserError) as error:
            return f"interrupted; the run's checkpoints cannot be read just now: {error}"
        if saved is None:
            return "interrupted before the first checkpoint; the same command begins at step 1"
        if self.total_steps is None or saved.step < self.total_steps:
            of = f" of {self.total_steps}" if self.total_steps else ""
            return f"interrupted; the same command continues from step {saved.step}{of}"
        if _evaluation_due(config, self.folder, saved.step):
            return (
                f"interrupted; the last step, {saved.step}, is trained and saved; the same command "
                "makes the evaluation that is left"
            )
        return (
            f"interrupted; the run is finished all the same: its last step, {saved.step}, is saved"
        )


def _run(config: Config, start: Start, progress: Progress) -> Outcome:
    folder, owner = start.folder, start.owner
    assert owner is not None
    catalogue = Catalogue.of(config.checkpoint, folder)

    say = preflight.saying(progress)

    _wait_for_nodes(config, say, owner)
    shares = Shares.of(config)  # a cluster that cannot do it says so before hours of indexing
    given = config
    if not shares.gpu and config.parallel.threads is None:
        config = with_threads(config, shares.threads)
    config, line = precision.settled(config, shares.gpu)
    if line is not None:
        say(line)
    if not shares.gpu and config.train.tf32:
        log.warning("train.tf32: does nothing: workers compute on CPUs")
    if config is not given:
        owner.require()
        write_config(config, folder)
    if config.data.tokens_per_batch == "auto":
        encoder, index = preflight.read_train(config, folder, say, owner)
        say("trying budgets for data.tokens_per_batch: auto, with real steps")
        config = with_budget(config, budget.find(config, folder, encoder, index))
        owner.require()
        write_config(config, folder)
    saved, _ = catalogue.newest()
    cursor = Cursor.from_json(saved.meta()["cursor"]) if saved else None
    prepared = preflight.prepare(config, folder, cursor, say, owner)
    start.total_steps = prepared.total_steps
    owner.require()
    _record_rejected(folder, prepared.rejected)
    if saved is not None:
        before = saved.meta()
        another_length(  # for its refusals
            *(config, saved.step, before.get("total_steps"), prepared.total_steps),
            before.get("asked"),
        )
        if _nothing_left(prepared, folder, catalogue):
            say(f"{folder} is finished: all {prepared.total_steps} steps are trained")
            return _outcome(folder, catalogue)
        if saved.step < prepared.total_steps:
            say(f"continuing {folder} from step {saved.step}")
        else:
            say(f"{folder} is trained to its last step, {saved.step}; its evaluation is left")
    _wait_for_nodes(config, say, owner)  # indexing may have taken so long that they are gone again
    settings = {
        "train": tuple(plans.places(folder)),
        "eval": (prepared.eval.place,) if prepared.eval else None,
        "encoder": ray.put(prepared.encoder),
        "total_steps": prepared.total_steps,
        "examples": len(prepared.train) + len(prepared.train.rejected),
        "submitted": start.at,
        "until": start.until,
        "summary": preview.summary(prepared, folder),
        "lease": owner.lease,
        "driver": Process.this(),
        # Not the text itself: Ray shows what workers are given.
        "credentials": ray.put(loggers.credentials(config.log)),
    }
    step, shown = saved.step if saved else -1, with_page(progress, folder)
    leave = start.leave.is_set if start.leave is not None else lambda: False
    meanwhile: Callable[[ActorHandle], AbstractContextManager[object]] = nullcontext
    if config.evaluate.apart and prepared.eval is not None:
        measure = Measure.taken(prepared.eval, config.evaluate, final=False)
        meanwhile = Beside(config, folder, settings, measure, Shares.of(config), owner).meanwhile
    try:
        workers.run(config, folder, settings, step, shown, owner, leave, meanwhile)
    except UserError as error:
        # A full disk is what it may be about, or that the run is another's now.
        with contextlib.suppress(OSError, UserError):
            owner.require()
            events = Lines(folder / "events.jsonl")
            events.write({"time": round(time.time(), 3), "event": "failed", "reason": str(error)})
            events.close()
        raise
    return _outcome(folder, catalogue, shown=True)


def _check_cluster(config: Config) -> None:
    """Raises UserError where the cluster, as it is, cannot do it, nor grow until it can."""
    if not growing.expected(config) and not readers.expected(config):
        Shares.of(config)


def _wait_for_nodes(config: Config, say: Callable[[str], None], permit: Permit = ANYONE) -> None:
    """Where the cluster grows: until GPUs for the workers are there, and nodes that read."""
    growing.wait(config, say, permit)
    readers.wait(config, say, permit)


def _outcome(folder: Path, catalogue: Catalogue, shown: bool = False) -> Outcome:
    lines = read_lines(folder / "eval.jsonl")
    saved, _ = catalogue.newest()
    return Outcome(folder, saved.step if saved else 0, lines[-1] if lines else {}, shown)


def _nothing_left(prepared: Prepared, folder: Path, catalogue: Catalogue) -> bool:
    """Whether the last step is saved, to the last byte, and evaluated where it is to be."""
    newest, _ = catalogue.newest()
    if newest is None or newest.step < prepared.total_steps:
        return False
    if _evaluation_due(prepared.config, folder, newest.step, prepared.eval):
        return False
    if prepared.config.evaluate.apart and prepared.eval is not None:
        measure = Measure.taken(prepared.eval, prepared.config.evaluate, final=False)
        if left(folder, prepared.config, prepared.total_steps, measure):
            return False
    sound, _ = catalogue.newest(Saved.damage)
    return sound is not None and sound.step == newest.step


def _evaluation_due(config: Config, folder: Path, step: int, index: Index | None = None) -> bool:
    """Whether the evaluation of the last step is still to be made. index: of data.eval, where that
    was read already; without it any evaluation of all examples counts as that one."""
    if not config.data.eval or not config.evaluate.at_end:
        return False
    done = Evaluations.load(folder)
    if index is not None:
        return not done.known(step, Measure.taken(index, config.evaluate, True, config.speak))
    return not any(item.step == step and item.whole for item in done.items)


def _record_rejected(folder: Path, rejected: list[Quarantined]) -> None:
    """Name examples found unusable before training, once."""
    path = folder / "quarantine.jsonl"
    known = Known()
    for line in stream_lines(path, {"id": str, "reason": str}):
        known.add(line)
    lines = Lines(path)
    for found in rejected:
        line = quarantine_line(found, 0)
        if known.add(line):
            lines.write(line)
    lines.close()
