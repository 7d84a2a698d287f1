"""evaluations.json: what the evaluations of a run found, and what they measured.

State that `checkpoint.best` is decided by; eval.jsonl is the log that people read. Each keeps to
itself: a line of the log that is edited or deleted changes no state. Lines of steps that the state
does not know are taken into it: those of runs from before there was one, and the last line of a
start that was killed between the two.

A figure is compared only with figures of the same measure: the same examples of the same data,
normalised the same way. Needs no torch: the driver and the export read it too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from raysft.config.checkpoint import Checkpoint
from raysft.config.evaluation import Evaluate
from raysft.config.objectives import Objective
from raysft.config.schema import Config
from raysft.config.speaking import Speak
from raysft.data.index.table import Index
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.patience import patiently
from raysft.run.catalogue import Catalogue, Saved, best_step
from raysft.run.lines import read_lines
from raysft.run.storage import write_whole
from raysft.scorers import figure_of, figures_of, of_losses, scorers, text_figures

NAME = "evaluations.json"
_RULES = 3  # counts up with every change of how texts are compared
_DECIDING = ("normalize", "spelling", "max_new_tokens")  # keys of `evaluate` that do so too


@dataclass(frozen=True)
class Measure:
    """What an evaluation measures.

    sources: by name {"data": digest of the source's files, "examples": how many of them are
    evaluated, "of": how many there are}. rules: digest of how texts are made and compared.
    signatures: of metrics that have one, how they are made (`Scorer.signature`).
    """

    sources: dict[str, JsonObject] = field(default_factory=dict)
    rules: str = ""
    signatures: dict[str, str] = field(default_factory=dict)

    def of(self, metric: str) -> tuple[object, ...]:
        """What `metric` depends on: its source's entry, where its name ends in one, or all."""
        data = self.sources.get(metric.partition("/")[2], self.sources)
        if of_losses(metric):
            return (data,)
        signature: str | list[tuple[str, str]] | None = self.signatures.get(metric)
        if "/" not in metric:  # the mean over all sources
            named = [name for name in self.signatures if name.startswith(f"{metric}/")]
            signature = [(name, self.signatures[name]) for name in sorted(named)] or None
        return (data, self.rules) if signature is None else (data, self.rules, signature)

    @classmethod
    def taken(
        cls, index: Index, settings: Evaluate, final: bool, speak: Speak | None = None
    ) -> Measure:
        """Of an evaluation on `index`. final: of all examples, whatever evaluate.max_examples, and
        of what the model speaks, as `speak` says."""
        counts = np.bincount(index.source, minlength=len(index.sources)).tolist()
        found = {}
        for number, (source, count) in enumerate(zip(index.described, counts)):
            files = [[file.digest, file.part] for file in index.files if file.source == number]
            facts = [source["format"], source["task"], files]
            digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
            limit = count if final else settings.max_examples or count
            found[source["name"]] = {"data": digest, "examples": min(limit, count), "of": count}
        facts = [_RULES, *(getattr(settings, key) for key in _DECIDING)]
        if settings.metrics:  # only then: the rules of a run from before there was this key stay
            facts.append(settings.metrics)
        if settings.speaks and final and speak is not None:
            told = settings.model_dump(include={"asr", "speakers", "speak_examples"})
            facts.append([told, speak.model_dump()])
        rules = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return cls(found, rules, _signatures(index, settings))


def _signatures(index: Index, settings: Evaluate) -> dict[str, str]:
    """Of what an evaluation on `index` gives."""
    given = set(metrics_of(index, settings))
    return {
        f"{figure.name}/{source.name}": row.signature(settings, source.name)
        for row in scorers()
        if row.signature is not None
        for figure in row.figures
        for source in index.sources
        if f"{figure.name}/{source.name}" in given
    }


def metrics_of(index: Index, settings: Evaluate, objective: Objective = "sft") -> list[str]:
    """Names of what an evaluation on `index` gives, where its clips can be read. objective: of the
    run."""
    losses = [
        scorer
        for scorer in scorers()
        if scorer.wants == "losses" and scorer.objective in ("", objective)
    ]
    found = []
    for number, source in enumerate(index.sources if settings.generate else []):
        tasks = [index.tasks[task] for task in np.unique(index.task[index.source == number])]
        asked = {name for task in tasks for name in figures_of(task, settings.metrics)}
        found += [f"{name}/{source.name}" for name in text_figures() if name in asked]
    for task in index.tasks:
        own = [row for row in losses if not row.only or task in row.only]
        found += [f"{figure.name}/{task}" for row in own for figure in row.figures]
    return found


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    measure: None where it was not recorded (runs of older versions): taken for the same as any.
    final: that of all data at the end, not one of the series that evaluate.every asks for.
    """

    step: int
    figures: dict[str, float]
    measure: Measure | None = None
    final: bool = False

    @property
    def whole(self) -> bool:
        """Whether all examples were evaluated, as far as is known."""
        sources = self.measure.sources.values() if self.measure is not None else ()
        return all(source["examples"] == source["of"] for source in sources)

    def line(self, checkpoint: bool) -> JsonObject:
        """As a line of eval.jsonl. checkpoint: whether one of its step was saved."""
        measure = asdict(self.measure) if self.measure is not None else {}
        if not measure.get("signatures"):
            measure.pop("signatures", None)
        facts = {"final": self.final, "checkpoint": checkpoint}
        return {"step": self.step, **self.figures, **measure, **facts}

    @classmethod
    def from_line(cls, line: JsonObject) -> Evaluation:
        """The inverse of `line`, of any version."""
        measure = None
        if "sources" in line:
            measure = Measure(line["sources"], line["rules"], line.get("signatures", {}))
        return cls(line["step"], figures(line), measure, line.get("final", False))


@dataclass(frozen=True)
class Made:
    """What an evaluation of a checkpoint, made beside training, has come to.

    found: None where it failed. warnings: for the user. predictions: a file for `predictions/`.
    """

    step: int
    found: Evaluation | None
    warnings: list[str] = field(default_factory=list)
    predictions: Path | None = None


def predictions_of(run: Path, step: int, draft: str = "") -> Path:
    """The file of what was answered at `step`; draft: by whom it is not finished yet."""
    name = f"step_{step}.jsonl"
    return run / "predictions" / (f".{draft}.{name}" if draft else name)


def spoken_of(predictions: Path) -> Path:
    """The folder of what was spoken in the evaluation whose answers are in this file."""
    return predictions.with_suffix(".spoken")


def clear_drafts(run: Path, owner: str) -> None:
    """Delete what is not finished of `predictions_of` and `spoken_of`, of all owners but the one
    whose drafts begin so."""
    for draft in (run / "predictions").glob(".*"):
        if draft.name.startswith(f".{owner}"):
            continue
        if draft.suffix == ".jsonl":
            draft.unlink(missing_ok=True)
        elif draft.suffix == ".spoken":
            shutil.rmtree(draft, ignore_errors=True)


def place_answers(run: Path, draft: Path, step: int) -> None:
    """Make a draft of what was answered at `step`, and of what was spoken, that of the run."""
    target = predictions_of(run, step)
    if draft.exists():
        os.replace(draft, target)
    if spoken_of(draft).exists():
        shutil.rmtree(spoken_of(target), ignore_errors=True)
        os.replace(spoken_of(draft), spoken_of(target))


def due(every: int, step: int, total: int) -> bool:
    """Whether what is done every so many steps is done after `step` of `total`; not after the
    last, which has its own."""
    return bool(every) and step % every == 0 and 0 < step < total


def figures(line: JsonObject) -> dict[str, float]:
    """The metrics of a line of eval.jsonl: wer/SOURCE, loss/TASK and their kind."""
    return {name: value for name, value in line.items() if "/" in name}


def value_of(found: Mapping[str, float], metric: str) -> float:
    """The value of a metric in an evaluation's figures: of wer/dev its own, of a kind alone (loss,
    wer) the mean over all tasks or sources that have it. NaN where there is none."""
    if "/" in metric:
        return found.get(metric, math.nan)
    own = [value for name, value in found.items() if name.partition("/")[0] == metric]
    return math.fsum(own) / len(own) if own else math.nan


def is_given(metric: str, names: Iterable[str]) -> bool:
    """Whether figures of these names give a metric, or the kind that it is."""
    return any(metric in (name, name.partition("/")[0]) for name in names)


def table(line: JsonObject) -> str:
    """A line of eval.jsonl for people: what texts are measured by, by source; losses by task."""
    found = figures(line)
    sources = line.get("sources", {})
    parts = []

    def counted(source: str) -> str:
        if source not in sources:  # a task, of a figure whose scorer is not registered here
            return "-"
        used, there = sources[source]["examples"], sources[source]["of"]
        return f"{there:,}" if used == there else f"{used:,} of {there:,}"

    spoken = {n.partition("/")[2] for n in found if n.startswith("spoken/")}

    def of_task(name: str) -> bool:
        return of_losses(name) or name.partition("/")[2] in spoken

    for title, by_task in (("source", False), ("task", True)):
        mine = {n: v for n, v in found.items() if of_task(n) == by_task}
        kinds = list(dict.fromkeys(name.partition("/")[0] for name in mine))
        names = list(dict.fromkeys(name.partition("/")[2] for name in mine))
        rows = [[title, *kinds]] if mine else []
        for name in names:
            rows.append([name, *(_shown(kind, mine.get(f"{kind}/{name}")) for kind in kinds)])
        if sources and not by_task and mine:
            rows = [[*row, cell] for row, cell in zip(rows, ["examples", *map(counted, names)])]
        wide = max((len(row[0]) for row in rows), default=0)
        parts += [
            f"  {row[0]:<{wide}}" + "".join(f"  {cell:>10}" for cell in row[1:]) for row in rows
        ]
    return "\n".join(parts)


def _shown(kind: str, value: float | None) -> str:
    return "-" if value is None else figure_of(kind).shown(value)


def duration(seconds: float) -> str:
    """For people: 40 s, 5 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress_of(
    report: Callable[[JsonObject], None] | None, every_s: float = 10.0
) -> Callable[[int, int], None]:
    """Tells now and then how many batches of an evaluation are done, and how long the others take
    at their pace; with None, nobody."""
    told = begun = time.monotonic()

    def seen(done: int, total: int) -> None:
        nonlocal told, begun
        now = time.monotonic()
        if not done:
            told = begun = now
        if report is not None and done and now - told >= every_s:
            told = now
            left = duration((now - begun) / done * (total - done))
            report({"doing": f"evaluated {done:,} of {total:,} batches, about {left} left"})

    return seen


class Evaluations:
    """All evaluations of a run, oldest first."""

    def __init__(self, items: Iterable[Evaluation] = ()) -> None:
        self.items = list(items)

    @classmethod
    def load(cls, run: Path) -> Evaluations:
        """Of the run in folder `run`. Raises UserError where the file is damaged."""
        path = run / NAME
        found = cls()
        if patiently(path.exists, path):
            try:
                for item in json.loads(patiently(path.read_bytes, path)):
                    measure = item["measure"] and Measure(**item["measure"])
                    found.items.append(Evaluation(**{**item, "measure": measure}))
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path}: cannot be read ({error}); restore it, or delete it: the figures are "
                    "then taken from eval.jsonl"
                ) from error
        known = {item.step for item in found.items}
        old: dict[tuple[int, str], Evaluation] = {}
        for line in read_lines(run / "eval.jsonl", {"step": int}):
            said = Evaluation.from_line(line)
            if said.step not in known:
                # Of older lines the first of a step is the run's own: jobs/evaluate.py wrote later.
                old.setdefault((said.step, repr(said.measure)), said)
        found.items = sorted([*found.items, *old.values()], key=lambda item: item.step)
        return found

    def save(self, run: Path) -> None:
        """Write it, whole or not at all."""
        write_whole(run / NAME, json.dumps([asdict(item) for item in self.items]).encode())

    def until(self, step: int) -> Evaluations:
        """Those up to a step: what is known where a run goes on from it."""
        return Evaluations(item for item in self.items if item.step <= step)

    def add(self, new: Evaluation) -> None:
        """Take in one more; it replaces an earlier one of its step and measure."""
        self.items = [
            item for item in self.items if (item.step, item.measure) != (new.step, new.measure)
        ] + [new]

    def known(self, step: int, measure: Measure) -> bool:
        """Whether this was measured at `step` already."""
        return any(item.step == step and item.measure in (None, measure) for item in self.items)

    def pending(self, steps: Iterable[int], every: int, total: int, measure: Measure) -> list[int]:
        """Those of `steps` (those with a checkpoint) whose evaluation is due, and was not made."""
        return [step for step in steps if due(every, step, total) and not self.known(step, measure)]

    def best(self, metric: str, mode: str, steps: Iterable[int]) -> int | None:
        """The best of `steps` (those with a checkpoint) by a metric; None where none is measured.

        Compared are the figures that measure the same as the newest of the run's series; figures
        that are no number (a loss of NaN) are in no comparison.
        """
        series = self._series(metric)
        return self._best(series[-1].measure, metric, mode, steps) if series else None

    def bests(self, metric: str, mode: str, steps: Iterable[int]) -> set[int]:
        """Those of `steps` that must not go: the best by each measure that the series has had.

        Figures of two measures do not say which of their bests is the better one, so that a change
        of data.eval or of how texts are compared is no reason to delete a checkpoint.
        """
        there = list(steps)
        measures = {
            repr(item.measure.of(metric)): item.measure
            for item in self._series(metric)
            if item.measure is not None
        }
        found = {self._best(measure, metric, mode, there) for measure in measures.values()}
        return {step for step in (*found, self.best(metric, mode, there)) if step is not None}

    def _having(self, metric: str) -> list[Evaluation]:
        return [item for item in self.items if math.isfinite(value_of(item.figures, metric))]

    def _series(self, metric: str) -> list[Evaluation]:
        having = self._having(metric)
        return [item for item in having if not item.final] or having

    def _best(
        self, wanted: Measure | None, metric: str, mode: str, steps: Iterable[int]
    ) -> int | None:
        there = set(steps)
        same = {
            item.step: {metric: value_of(item.figures, metric)}
            for item in self._having(metric)
            if item.step in there
            and (
                item.measure is None
                or wanted is None
                or item.measure.of(metric) == wanted.of(metric)
            )
        }
        return best_step(same, metric, mode)


def left(
    run: Path, config: Config, total: int, measure: Measure, given: Collection[int] = ()
) -> list[int]:
    """Steps of which the run keeps a checkpoint whose evaluation is due, by `evaluate.every`, and
    was not made; the oldest first. total: steps of the run. given: passed over."""
    catalogue = Catalogue.of(config.checkpoint, run)
    steps = [saved.step for saved in catalogue.committed() if saved.step not in given]
    return Evaluations.load(run).pending(steps, config.evaluate.every, total, measure)


def choose(
    run: Path,
    settings: Checkpoint,
    word: str,
    damage: Callable[[Saved], str | None],
    option: str = "--step",
) -> tuple[Saved, list[str]]:
    """The checkpoint that `word` names: a step, `best` or `last`; and why newer ones than the last
    sound one were passed over.

    damage: what is wrong with a checkpoint, or None. option: of the command line, for messages.
    Raises UserError where there is none such.
    """
    catalogue = Catalogue.of(settings, run)
    if word == "last":
        newest, skipped = catalogue.newest(damage)
        if newest is None:
            raise UserError(f"{run}: no committed checkpoint; train first")
        return newest, skipped
    kept = {saved.step: saved for saved in catalogue.committed()}
    there = ", ".join(map(str, kept)) or "none"
    if word == "best":
        if settings.best is None:
            raise UserError(
                f"{option} best: {run} has no checkpoint.best, so no figure says which; set it "
                f"(checkpoint.best: wer/NAME) and go on, or give a step; kept are {there}"
            )
        step = Evaluations.load(run).best(settings.best, settings.best_mode, kept)
        if step is None:
            raise UserError(
                f"{option} best: no checkpoint of {run} has a figure of {settings.best}; give a "
                f"step; kept are {there}"
            )
    elif word.isdecimal():
        step = int(word)
    else:
        raise UserError(f"{option} {word}: has to be a step, best or last")
    if step not in kept:
        raise UserError(f"{option} {step}: {run} keeps no checkpoint of it; kept are {there}")
    reason = damage(kept[step])
    if reason is not None:
        raise UserError(f"{kept[step].where}: {reason}; kept are {there}")
    return kept[step], []
