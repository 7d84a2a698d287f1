"""Stages: several trainings in one process, one after the other, each a run of its own.

Each is what `launch.run` does, so that it goes on from wherever it was killed. When one is finished
its best model is exported beside it, and then that is written down: from then on, while its config
stays the same, it is not looked at again. A stage that begins from that model finds it there.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from raysft import remarks
from raysft.adapters.attach import VIRTUAL
from raysft.config import Config, to_tree
from raysft.config.load import begins_from, pair_of, stage_configs, stages_to_yaml, stand_in
from raysft.driver import launch, preflight, warm
from raysft.driver.launch import Outcome, Progress
from raysft.driver.preflight import Say
from raysft.errors import UserError
from raysft.export import export_run, written
from raysft.page.live import with_page, write_page
from raysft.run.catalogue import Catalogue, Saved
from raysft.run.evaluations import Evaluations
from raysft.run.folder import read_config, run_folder
from raysft.run.lines import read_lines
from raysft.run.ownership import Ownership, refuse_held
from raysft.run.stages import Finished, StagesFolder, digest_of

log = logging.getLogger(__name__)


@dataclass
class Staged(Outcome):
    """How several stages ended: as the last of them, and each by its name."""

    stages: dict[str, Outcome] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)

    def describe(self) -> str:
        """What the user sees at the end."""
        lines = []
        for name, outcome in self.stages.items():
            how = self.finished[name]
            by = f" by {how.by}" if how.by else ", its last"
            best = f"best model: {StagesFolder(self.folder).best(name)} (step {how.best}{by})"
            lines += [f"stage {name}", outcome.describe(), best]
        return "\n".join([*lines, f"stages folder: {self.folder}"])


def chosen(config: Config) -> dict[str, Config]:
    """The configs of the stages that are to be run, by name, in order. Raises UserError."""
    only = config.only
    return {n: one for n, one in stage_configs(config).items() if only is None or n in only}


def check(config: Config, writes: bool = True) -> dict[str, Config]:
    """As `preflight.check`, of every stage that is to be run and is not finished: before the first
    one begins. Returns their configs; of a stage whose model is not there yet one with the same
    shapes. Raises UserError, which names the stage.
    """
    folder = StagesFolder(run_folder(config))
    configs = chosen(config)
    if writes:
        refuse_held(folder.path)
    found = {}
    for name, one in configs.items():
        if _is_finished(folder, name, one):
            continue
        missing = _missing(config, name, folder)
        for other in missing:
            if other not in configs and not folder.begun(other):
                raise UserError(
                    f"only: {name} begins from {other}, which is not trained: add it, only="
                    f"[{other}, {name}]"
                )
        if missing and not folder.begun(name):
            shaped = stand_in(config, name)
            if shaped is None:
                continue
            one = shaped if writes else _own_units(shaped)
        elif missing:
            continue  # once the model is there again
        elif not writes:
            one = _own_units(one)
        with _naming(name):
            found[name] = preflight.check(one, writes)
    return found


def all_finished(config: Config) -> bool:
    """Whether nothing is left to do of those stages: then `run` needs no Ray."""
    folder = StagesFolder(run_folder(config))
    return all(_is_finished(folder, name, one) for name, one in chosen(config).items())


def run(config: Config, progress: Progress) -> Staged:
    """Run, or go on with, the stages of `config` that `only` names.

    Raises UserError, which names the stage; KeyboardInterrupt or SystemExit after it has saved.
    """
    folder = StagesFolder(run_folder(config))
    say = preflight.saying(progress)
    with Ownership.take(folder.path, say):
        folder.open([*stage_configs(config)], stages_to_yaml(config))
        staged = Staged(folder.path, 0, {}, what="stages")
        wanted = chosen(config)
        shown = with_page(progress, folder.path)
        for number, (name, one) in enumerate(wanted.items(), 1):
            say(f"stage {name}: {number} of {len(wanted)}")
            with _naming(name):
                done = _is_finished(folder, name, one)
                for other in () if done else begins_from(config, name):
                    _require(folder, other, say)
                _start(config, name, folder, say, done)
                outcome = _run(folder, name, one, shown, begun=bool(staged.stages))
            staged.stages[name] = outcome
            staged.step, staged.evaluation = outcome.step, outcome.evaluation
            how = folder.finished(name)
            assert how is not None
            staged.finished[name] = how
            write_page(folder.path)
    return staged


def dry_run(
    config: Config, checked: dict[str, Config], progress: Progress, show: int, colours: bool
) -> str:
    """What each stage that `only` names would do, as text. Writes no run. checked: as `check`
    returns it. Raises UserError."""
    folder, wanted = StagesFolder(run_folder(config)), chosen(config)
    parts = []
    for name, one in wanted.items():
        if name not in checked:
            done = _is_finished(folder, name, one)
            parts.append(f"stage {name}: {'finished' if done else 'waits for its model'}")
            continue
        preflight.saying(progress)(f"stage {name}")
        with _naming(name):
            text = launch.dry_run(checked[name], progress, show, colours)
        missing = _missing(config, name, folder)
        shaped = (
            f"; here with the model that {' and '.join(missing)} begins with" if missing else ""
        )
        parts.append(f"stage {name}{shaped}\n{text}")
    return "\n\n".join(parts)


def _missing(config: Config, name: str, folder: StagesFolder) -> list[str]:
    """Stages that a stage begins from whose models are not there yet."""
    found, others = pair_of(config, name), begins_from(config, name)
    if found is not None:
        return [] if found[1].is_dir() else others
    return [other for other in others if not folder.best(other).is_dir()]


def _own_units(config: Config) -> Config:
    """As a dry run reads it: it leaves no fitted units behind."""
    units = config.data.speech_tokens
    if units is None or units.path is None or Path(units.path).exists():
        return config
    data = config.data.model_copy(update={"speech_tokens": units.model_copy(update={"path": None})})
    return config.model_copy(update={"data": data})


def _run(
    folder: StagesFolder, name: str, config: Config, progress: Progress, begun: bool
) -> Outcome:
    """Train a stage to its end, where it is not there yet, and export its best model.

    begun: other stages were trained by this process.
    """
    say = preflight.saying(progress)
    run = folder.run(name)
    if _is_finished(folder, name, config):
        how = folder.finished(name)
        assert how is not None
        say(f"stage {name} is finished: all {how.step} steps are trained")
        lines = read_lines(run / "eval.jsonl")
        return Outcome(run, how.step, lines[-1] if lines else {})
    preflight.check(config)
    if begun:
        warm.processes(config)
    outcome = launch.run(config, progress)
    best, by = _keep_best(folder, name, say)
    folder.finish(name, Finished(digest_of(to_tree(config)), outcome.step, best, by))
    return outcome


def _is_finished(folder: StagesFolder, name: str, config: Config) -> bool:
    """Whether there is nothing left to do of a stage, as it is asked for now."""
    if not folder.begun(name) or not folder.best(name).is_dir():
        return False
    how = folder.finished(name)
    return how is not None and how.config == digest_of(to_tree(config))


def _start(config: Config, name: str, folder: StagesFolder, say: Say, done: bool) -> None:
    """Assemble the pair that a stage begins with, where it has one that is not there yet. Raises
    UserError where it has begun with another. done: it is finished, and needs none."""
    found = pair_of(config, name)
    if found is None:
        return
    from raysft.families.pair import assemble

    pair, target = found
    if target.is_dir():
        if (made := assemble.made_of(target)) == pair:
            return
        if folder.begun(name):
            raise UserError(
                f"model.pair: {name} began with {made}, and it is {pair} now; set it back, or "
                f"delete {folder.run(name)} and {target} to begin it anew"
            )
        shutil.rmtree(target)
    if done:
        return
    say(f"stage {name}: putting its two models into {target}")
    remarks.quiet()
    written(target, lambda partial: assemble.assemble(pair, partial))


def _require(folder: StagesFolder, name: str, say: Say) -> None:
    """See to the best model of a stage that another begins from. Raises UserError where it is not
    finished."""
    if folder.best(name).is_dir():
        return
    if folder.finished(name) is None:
        raise UserError(f"begins from {name}, which is not finished; run that to its end first")
    _keep_best(folder, name, say)


def _keep_best(folder: StagesFolder, name: str, say: Say) -> tuple[int, str | None]:
    """Export the best model of a stage whose last step is saved, where it is not there yet. Returns
    its step and the metric; None: it is the last, where nothing was measured."""
    run, target, how = folder.run(name), folder.best(name), folder.finished(name)
    config = read_config(run)
    step, by = _best(run, config)
    if not target.is_dir():
        say(f"stage {name}: exporting step {step} to {target}")
        merge = config.peft.method not in ("none", *VIRTUAL)
        remarks.quiet()
        export_run(run, target, merge=merge, step=str(step))
    elif how is not None and how.best != step:
        log.warning(
            "stage %s: its best is step %d now, and %s is still of step %d; delete that folder to "
            "have it made again",
            *(name, step, target, how.best),
        )
        return how.best, how.by
    return step, by


def _best(run: Path, config: Config) -> tuple[int, str | None]:
    catalogue, metric = Catalogue.of(config.checkpoint, run), config.checkpoint.best
    if metric is not None:
        steps = [saved.step for saved in catalogue.committed()]
        step = Evaluations.load(run).best(metric, config.checkpoint.best_mode, steps)
        if step is not None:
            return step, metric
        log.warning("%s: no evaluation has given %s: its last step is taken", run, metric)
    newest, _ = catalogue.newest(Saved.damage)
    if newest is None:
        raise UserError(f"{run}: no committed checkpoint to export")
    return newest.step, None


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say of what goes wrong which stage it is in."""
    try:
        yield
    except UserError as error:
        raise UserError(f"stage {name}: {error}") from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"stage {name}: {error or 'interrupted'}") from None
