"""Which examples every lane trains on in every step: a pure function of (index, config, seed).

sources -> index -> plan (here) -> stream -> step -> checkpoint + cursor -> evaluate -> export
Reads only the index's columns (lengths, tasks, sources), never audio or text, and knows nothing of
workers: worker r of W takes lanes r, r+W, ... of each step, whatever W is.

    group       all examples; with `data.mix`, the examples of a task
    cycle       one pass over a group, in random order (`blocks`)
    window      `data.window` examples, one after the other in that order (`windows`): filled into
                micro-batches (`pack`), and these shuffled; or, sequential, filled as they come
    step        `data.lanes` micro-batches: the next ones of each group, as many as its share

Window j of cycle c depends on (seed, group, c, j) alone. So a `Cursor` of a few integers is the
whole state of the data side, and going on from any of them costs one order of the blocks, at most a
million examples of it, and one window, at 1% of an epoch as at 99%.

Without mix an epoch is a cycle; the lanes that its last step cannot fill are empty. With mix every
step is full: a group that ends its cycle begins the next one at once, and epoch e ends with the
step by which all groups have ended cycle e. Every example has then been seen e + 1 times or more.

Cost: planning does about 1 million examples a second; memory is that of `blocks` and one window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from raysft.config.schema import Data
from raysft.data.plan import plan_v1, plan_v2
from raysft.data.plan.blocks import (
    Blocks,
    Sizes,
    counted,
    permutation,
    single,
    together,
    too_heavy,
)
from raysft.data.plan.kinds import Languages, of_groups, of_languages, of_tasks
from raysft.data.plan.lanes import LaneShares
from raysft.data.plan.shares import Dealt, Wanted, agreeing, effective, grouped, wanted_of
from raysft.data.plan.windows import InOrder, Shuffled, Windows
from raysft.errors import UserError
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    from raysft.data.index.build import Index

ALGORITHM = 3
"""Part of the hash: raise it with any change that moves an example. Runs keep theirs."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a run stands: `step` steps are done, and group g goes on at `streams[g]`.

    streams: (cycle, window, micro-batch) of each group. Belongs to the plan named by its hash.
    """

    plan_hash: str
    epoch: int
    step: int
    streams: tuple[tuple[int, int, int], ...]

    def to_json(self) -> JsonObject:
        """As a dict that json can write."""
        return {
            "plan": self.plan_hash,
            "epoch": self.epoch,
            "step": self.step,
            "streams": [list(stream) for stream in self.streams],
        }

    @classmethod
    def from_json(cls, value: JsonObject) -> Cursor:
        """The inverse of `to_json`. Raises UserError for anything else."""
        try:
            streams = tuple((int(c), int(w), int(m)) for c, w, m in value["streams"])
            return cls(str(value["plan"]), int(value["epoch"]), int(value["step"]), streams)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint's cursor {value!r} cannot be read: expected plan, epoch, step and "
                "streams of three integers; continue from another checkpoint"
            ) from error


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step. step counts from 1 over the whole run, epoch from 0.

    lanes: for each of `data.lanes` lanes the rows of the index in it, int64 (may be empty).
    after: the cursor once this step is done.
    """

    epoch: int
    step: int
    lanes: list[np.ndarray]
    after: Cursor


@dataclass(slots=True)
class Summary:
    """What an epoch will be. Tokens are model positions.

    computed: positions a model computes: padded ones included in mode padded, none in mode packed.
    budget: positions the epoch's micro-batches could hold.
    """

    epoch: int
    steps: int = 0
    micro_batches: int = 0
    examples: int = 0
    tokens: int = 0
    computed: int = 0
    budget: int = 0
    tokens_by_task: dict[str, int] = field(default_factory=dict)

    @property
    def padding(self) -> float:
        """Share of the computed positions that is padding."""
        return 1 - self.tokens / self.computed if self.computed else 0.0

    @property
    def unfilled(self) -> float:
        """Share of the micro-batches' budget that is not used by tokens."""
        return 1 - self.tokens / self.budget if self.budget else 0.0


class Plan:
    """The plan of a run. Plans with equal `hash` give equal steps.

    settings: what the plan depends on beside the index, as json can write it.
    source: int [N], the column it was given. dealt: how often what of it is seen.
    languages: digest of which example is in which; None: it does not depend on them.
    oversize: int64, rows of the index longer than `data.tokens_per_batch`, or with more audio than
        `data.audio_per_batch`: never planned.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        task: np.ndarray,
        tasks: Sequence[str],
        source: np.ndarray,
        weights: Sequence[float],
        index_hash: str,
        data: Data,
        seed: int,
        algorithm: int = ALGORITHM,
        heard: np.ndarray | None = None,
        wanted: Wanted | None = None,
        languages: Languages | None = None,
    ) -> None:
        """tokens: int [N], positions of each example, at least 1. task, source: int [N], numbers
        into `tasks` and `weights`; the columns may be memory-mapped. Reads them once. algorithm:
        of planning; a run that goes on keeps the one it began with. heard: float32 [N], seconds
        that an encoder computes for each, which `data.audio_per_batch` needs. wanted: names and
        caps of the sources, beside their weights. languages: which `data.temperature` by lang
        needs.
        Raises UserError where this data cannot be planned as the config says."""
        if len(tokens) == 0:
            raise UserError("data.train has no usable example: nothing to train on")
        self._data, self._seed, self._tasks = data, seed, list(tasks)
        self._task, self.source = np.asarray(task), np.asarray(source)
        self._tokens = np.asarray(tokens)
        sizes: np.ndarray | Sizes = tokens
        if data.audio_per_batch is not None:
            assert heard is not None
            sizes = Sizes(tokens, heard, data.budget, data.audio_per_batch)
            index_hash += hashlib.sha256(np.ascontiguousarray(heard).data).hexdigest()
        self.languages: str | None = None
        if data.temperature is not None and data.temperature.by == "lang":
            assert languages is not None
            self.languages = languages.digest()
            index_hash += self.languages
        self._groups = sorted(data.mix)
        self._wanted = wanted or Wanted(list(weights))
        self._windows = self._planned(sizes, weights, algorithm, languages)
        self._blocks = self._windows.blocks
        self._check()
        self._shares = LaneShares([data.mix[name] for name in self._groups] or [1.0], data.lanes)
        self.oversize = self._blocks.oversize
        self.settings = _settings(data, weights, seed, algorithm) | self._wanted.settings(data)
        self.hash = _hash(index_hash, self.settings)
        self._summaries: list[Summary] = []
        self._epoch_starts = [self.start()]

    @classmethod
    def of(cls, index: Index, data: Data, seed: int, algorithm: int = ALGORITHM) -> Plan:
        """The plan of a whole index."""
        wanted = wanted_of(index)
        columns = index.tokens, index.task, index.tasks, index.source
        heard = None if data.audio_per_batch is None else index.heard
        by_lang = data.temperature is not None and data.temperature.by == "lang"
        langs = Languages(*index.languages) if by_lang else None
        settings = index.hash, data, seed, algorithm
        return cls(*columns, wanted.weights, *settings, heard, wanted, langs)

    def _planned(
        self,
        sizes: np.ndarray | Sizes,
        weights: Sequence[float],
        algorithm: int,
        languages: Languages | None,
    ) -> Windows:
        """The windows of the index, by that algorithm."""
        data, shuffled = self._data, self._data.order == "shuffled"
        named = bool(set(data.mix) & set(self._wanted.names) - set(self._tasks))
        by = data.temperature.by if data.temperature is not None else "source"
        now = shuffled and algorithm == ALGORITHM
        if (named or by != "source") and not now:
            key = "data.mix by source" if named else f"data.temperature by {by}"
            why = "order sequential" if not shuffled else "a run that began with an earlier raysft"
            raise UserError(f"{key}: {why} does not know it: leave it out")
        self._of_tasks = not now or not set(data.mix) & set(self._wanted.names)
        if languages is not None and by == "lang":
            self._kinds = of_languages(self._task, len(self._tasks), languages)
        elif now and (data.mix or by == "task"):
            self._kinds = of_tasks(self._task, len(self._tasks))
        else:
            self._kinds = of_groups(self._task, self._tasks, self._groups)
        if now:
            starts = counted(self.source)
        elif shuffled and algorithm != plan_v1.ALGORITHM:
            starts = single(self.source, weights)
        else:
            starts = together(self.source, data.window, weights)
        budget = sizes.budget if isinstance(sizes, Sizes) else data.budget
        columns = sizes, self._kinds.column, self._kinds.numbers, self.source, weights
        blocks = Blocks(*columns, starts, budget=budget, seed=self._seed, shuffled=shuffled)
        counts = blocks.by_source(len(weights))
        if now:
            langs = self._kinds.langs
            passes = effective(self._wanted, counts, data, langs)
            too_heavy(counts.sum(axis=0), (counts * passes).sum(), weights)
            self.dealt = Dealt(counts, passes, self._groups_of(counts), langs)
            groups = self.dealt.segments(self._groups)
            return Shuffled(blocks, data, self._seed, groups)
        counts = counts.sum(axis=0, keepdims=True)
        passes = effective(self._wanted, counts, data)
        there = np.flatnonzero(counts[0]).tolist()
        self.dealt = Dealt(counts, passes, {(0, source): "" for source in there})
        blocks.weights = passes[0].tolist()
        return _BEFORE[algorithm](blocks, data, self._seed) if shuffled else InOrder(blocks, data)

    def passes(self, rows: slice) -> np.ndarray:
        """float64 [rows]: how often these examples are seen in an epoch or, with `data.mix`, a pass
        of their group; one that is seen 2.3 times is seen two or three times."""
        kind = np.asarray(self._kinds.numbers)[self._kinds.column[rows]]
        return self.dealt.passes[kind, self.source[rows]]

    def _groups_of(self, counts: np.ndarray) -> dict[tuple[int, int], str]:
        """Of each kind and source that has examples its group; "" where there is no mix."""
        kinds, mix = self._kinds, self._data.mix
        places = [(kind, source) for kind, source in np.argwhere(counts).tolist()]
        if not mix:
            return dict.fromkeys(places, "")
        if self._of_tasks:
            names = {(kind, source): self._tasks[kinds.tasks[kind]] for kind, source in places}
            return {place: name for place, name in names.items() if name in mix}
        present = np.zeros((len(self._tasks), counts.shape[1]), bool)
        for kind, source in places:
            present[kinds.tasks[kind], source] = True
        groups = grouped(self._data, self._tasks, list(self._wanted.names), present)
        return {(kind, source): groups[kinds.tasks[kind], source] for kind, source in places}

    def start(self, epoch: int = 0, step: int = 0) -> Cursor:
        """The cursor before the first step of `epoch`, when `step` steps have been done before it:
        every group stands before a new cycle."""
        streams = ((epoch, 0, 0),) * len(self._shares)
        if epoch:  # from which nothing may be due, where sources have little weight
            streams = tuple(_Stream(self, group, at).at for group, at in enumerate(streams))
        return Cursor(self.hash, min(at[0] for at in streams), step, streams)

    def begins(self, cursor: Cursor) -> bool:
        """Whether no step of the cursor's epoch is done yet.

        Then the last step had begun in the epoch before: it ended a group's cycle there, so since
        that end it has taken fewer micro-batches of this group than it took in all.
        """
        last = self._shares.at(cursor.step - 1) if self._groups and cursor.step else [1]
        for group, at in enumerate(cursor.streams):
            stream = _Stream(self, group, (cursor.epoch, 0, 0))
            for _ in range(last[group] if len(last) > group else 1):
                if stream.at == at or at == (cursor.epoch, 0, 0):
                    return True
                stream.take(1, None)
        return False

    def owns(self, cursor: Cursor) -> bool:
        """Whether the cursor is one of this plan."""
        return cursor.plan_hash == self.hash and len(cursor.streams) == len(self._shares)

    def steps(self, cursor: Cursor) -> Iterator[PlannedStep]:
        """The steps after `cursor`, epoch after epoch without end, planned window by window.

        Raises UserError where the cursor belongs to another plan.
        """
        if not self.owns(cursor):
            raise UserError(
                f"this checkpoint was made with another plan ({cursor.plan_hash[:12]}, now "
                f"{self.hash[:12]}): the training data, run.seed or one of data.lanes, "
                "data.tokens_per_batch, data.audio_per_batch, data.mode, data.order, data.mix, "
                "data.temperature, data.window and the sources' weights have changed; undo the "
                "change or start a run of another name"
            )
        streams = [_Stream(self, group, at) for group, at in enumerate(cursor.streams)]
        return self._steps(streams, cursor.epoch, cursor.step)

    def count_steps(self, epoch: int) -> int:
        """How many steps epoch number `epoch` has, exactly. Plans all epochs up to it, once."""
        return self.summary(epoch).steps

    def summary(self, epoch: int = 0) -> Summary:
        """Totals of an epoch. Plans all epochs up to it, once: about 1 s a million examples."""
        while len(self._summaries) <= epoch:
            total, after = self.summarise(len(self._summaries), self._epoch_starts[-1])
            self._summaries.append(total)
            self._epoch_starts.append(after)
        return self._summaries[epoch]

    def summarise(self, epoch: int, start: Cursor) -> tuple[Summary, Cursor]:
        """Totals of the epoch that begins at `start`, and where the next one begins."""
        total = Summary(epoch)
        pad, by_task = self._data.mode == "padded", np.zeros(len(self._tasks), np.int64)
        # An epoch in which no example of a lightly weighted source has its turn has no step.
        steps = self.steps(start) if start.epoch == epoch else iter(())
        for planned in steps:
            total.steps += 1
            lanes = [rows for rows in planned.lanes if len(rows)]
            lengths = self._tokens[np.concatenate(lanes)].astype(np.int64)
            sizes = np.array([len(rows) for rows in lanes])
            total.micro_batches += len(lanes)
            total.examples += len(lengths)
            longest = np.maximum.reduceat(lengths, np.cumsum(sizes) - sizes)
            total.computed += int((sizes * longest).sum() if pad else lengths.sum())
            task = self._task[np.concatenate(lanes)]
            by_task += np.bincount(task, lengths, len(by_task)).astype(np.int64)
            start = planned.after
            if start.epoch > epoch:
                break
        total.tokens = int(by_task.sum())
        total.budget = total.micro_batches * self._data.budget
        total.tokens_by_task = {
            name: int(n) for name, n in zip(self._tasks, by_task, strict=True) if n
        }
        return total, start

    def _check(self) -> None:
        """Refuse data that this config cannot plan."""
        budget = self._data.tokens_per_batch
        present = self._kinds.by_task(self._blocks.present, len(self._tasks))
        audio = self._data.audio_per_batch
        over = f"data.tokens_per_batch={budget}"
        over += "" if audio is None else f" (or data.audio_per_batch={audio:g})"
        tasks = sorted(name for name, n in zip(self._tasks, present, strict=True) if n)
        if self._of_tasks and self._groups and self._groups != tasks:
            raise UserError(
                f"data.mix names the tasks {', '.join(self._groups)}, the training data has "
                f"{', '.join(tasks)}: {agreeing(self._groups, tasks)}, or remove data.mix"
            )
        if not self._windows.examples.any():
            raise UserError(
                f"{over} is smaller than every example (the shortest takes "
                f"{int(self._tokens.min())} positions): raise it"
            )
        for name, examples in zip(self._groups, self._windows.examples, strict=False):
            if not examples:
                what = "task" if self._of_tasks else "data.mix"
                raise UserError(
                    f"{over} is smaller than every example of {what} "
                    f"{name}: raise it, or remove {name} from data.train and data.mix"
                )

    def _steps(self, streams: list[_Stream], epoch: int, step: int) -> Iterator[PlannedStep]:
        lanes = self._data.lanes
        while True:
            epoch = max(epoch, min(stream.cycle for stream in streams))
            end = None if self._groups else epoch
            taken: list[np.ndarray] = []
            for stream, count in zip(streams, self._shares.at(step), strict=True):
                taken += stream.take(count, end)
            taken += [np.zeros(0, np.int64)] * (lanes - len(taken))
            step += 1
            if self._data.order == "shuffled":
                taken = [taken[i] for i in permutation(lanes, self._seed, "lanes", step)]
            after = Cursor(
                self.hash,
                max(epoch, min(stream.cycle for stream in streams)),
                step,
                tuple(stream.at for stream in streams),
            )
            yield PlannedStep(epoch, step, taken, after)


class _Stream:
    """A group's micro-batches, window after window, cycle after cycle. Always stands before one."""

    def __init__(self, plan: Plan, group: int, at: tuple[int, int, int]) -> None:
        self._plan, self._group = plan, group
        self.cycle, self.window, self.place = at
        self._cycle = plan._windows.cycle(group, self.cycle)
        self._batches: list[np.ndarray] = []
        if 0 <= self.window < self._cycle.windows:
            self._batches = self._cycle.micro_batches(self.window)
        if at != (self.cycle, 0, 0) and not 0 <= self.place < len(self._batches):
            raise UserError(
                f"the checkpoint's cursor points at cycle, window, micro-batch {at}, which this "
                "plan does not have: the file is damaged; continue from another checkpoint"
            )
        self._settle()

    def take(self, count: int, end: int | None) -> list[np.ndarray]:
        """The next `count` micro-batches; fewer where cycle number `end` ends before."""
        taken: list[np.ndarray] = []
        while len(taken) < count and (end is None or self.cycle <= end):
            taken.append(self._batches[self.place])
            self.place += 1
            self._settle()
        return taken

    @property
    def at(self) -> tuple[int, int, int]:
        """Cycle, window and micro-batch it stands before."""
        return self.cycle, self.window, self.place

    def _settle(self) -> None:
        """Move on to the next micro-batch there is: windows and cycles may be empty."""
        while self.place >= len(self._batches):
            self.window, self.place = self.window + 1, 0
            if self.window >= self._cycle.windows:
                self.cycle, self.window = self.cycle + 1, 0
                self._cycle = self._plan._windows.cycle(self._group, self.cycle)
            windows = self._cycle.windows
            self._batches = self._cycle.micro_batches(self.window) if windows else []


_BEFORE: dict[int, Callable[[Blocks, Data, int], Windows]] = {
    plan_v1.ALGORITHM: plan_v1.Shuffled,
    plan_v2.ALGORITHM: plan_v2.Shuffled,
}
"""Order shuffled of earlier algorithms; order sequential is the same in all."""

ALGORITHMS = (*_BEFORE, ALGORITHM)


def _settings(data: Data, weights: Sequence[float], seed: int, algorithm: int) -> JsonObject:
    """What the plan depends on beside the index."""
    audio = {} if data.audio_per_batch is None else {"audio_per_batch": data.audio_per_batch}
    return {
        "algorithm": algorithm,
        "weights": [float(weight) for weight in weights],
        "seed": seed,
        "lanes": data.lanes,
        "tokens_per_batch": data.tokens_per_batch,
        "mode": data.mode,
        "order": data.order,
        "mix": dict(data.mix),
        "window": data.window,
        **audio,
    }


def _hash(index_hash: str, settings: JsonObject) -> str:
    """What the plan depends on, as 64 hex digits."""
    facts = {"index": index_hash, **settings}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
