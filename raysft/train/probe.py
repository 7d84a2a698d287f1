"""data.tokens_per_batch: auto. The largest budget that fits into memory, found by real steps.

Runs before a run's plan is made, in workers of their own: what it did to weights, optimizer and
random numbers ends with them. A trial of a budget takes whole steps, with every token supervised,
on the batches that hold most: full of the longest example, of the middle one and of the shortest
(for audio the most clips, within data.audio_per_batch: each may cost the encoder the same,
whatever its length). Its peak is that of the worst batch on the worst worker, so all workers decide
alike. Where memory is host memory, a copy of the state is held meanwhile, as by a checkpoint that
is being written.

Peaks grow about linearly, so the search goes where the line through the last two would end, at
most GROWTH times as far in one go, and halves what is left after a trial that did not fit: some
five trials, at most about a minute (TIME_S). A GPU's memory is asked for only where the line says
that it is there; where it runs out all the same, the model is built anew.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from raysft.config.schema import Config
from raysft.data.example import MicroBatch, Sequence
from raysft.errors import UserError
from raysft.models.base import SpeechModel
from raysft.models.layout import Static
from raysft.parallel import Strategy, World
from raysft.train.feed import one_shape, turn_of
from raysft.train.memory import host_peak
from raysft.train.step import StepBatch, forward_backward

log = logging.getLogger(__name__)

FREE = 0.1  # share of the memory that stays free
MULTIPLE = 64  # budgets are multiples of it
CLOSE = 0.03  # a search ends when the budgets that fit and do not are this close
GROWTH = 4
TIME_S = 60.0

Factory = Callable[[], tuple[SpeechModel, Strategy]]


@dataclass(frozen=True)
class Lengths:
    """Of the examples in an index, in model positions. most: all of them, shared by the lanes: a
    larger budget would leave lanes empty. heard: of the examples of each of these lengths, the
    least seconds that the encoder computes for one; empty where data.audio_per_batch is unset."""

    shortest: int
    middle: int
    longest: int
    most: int
    heard: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: np.ndarray, lanes: int, heard: np.ndarray | None = None) -> Lengths:
        """tokens: int [N], heard: float [N], the index's columns."""
        low, middle, high = np.quantile(tokens, [0, 0.5, 1], method="nearest").tolist()
        least = {}
        if heard is not None:
            least = {n: float(heard[tokens == n].min()) for n in {low, middle, high}}
        return cls(low, middle, high, -(-int(np.sum(tokens, dtype=np.int64)) // lanes), least)

    def count(self, length: int, budget: int, audio: float | None) -> int:
        """Examples of this length in a micro-batch. audio: seconds that it may have."""
        found = budget // length
        if audio is not None and self.heard.get(length):
            found = min(found, int(audio / self.heard[length]))
        return max(1, found)


def find_budget(
    config: Config, factory: Factory, lengths: Lengths, world: World, limit: int | None = None
) -> int:
    """The largest `data.tokens_per_batch` with which training leaves FREE of `limit` free.

    factory: builds model and strategy; called again only after memory has run out. limit: bytes a
    worker may use; None: `limit_of`. The same on every worker; a collective. Raises UserError
    where even one micro-batch of the longest example does not fit.
    """
    limit = min(world.gather(limit_of(config, world) if limit is None else limit))
    begun = time.monotonic()
    trials = _Trials(config, factory, lengths, world)
    least, most = _up(lengths.longest), _up(max(lengths.longest, lengths.most))
    search = Search(least, most, (1 - FREE) * limit, trials.smallest())
    while (budget := search.next()) is not None:
        peak = trials.peak(budget)
        search.tell(budget, peak)
        if world.is_main:
            log.info("data.tokens_per_batch: %d takes %.2f GB", budget, peak / 1e9)
        if not search.fits:
            raise UserError(
                f"data.tokens_per_batch: auto: the longest example takes {lengths.longest} "
                f"positions, and a step with it {_gb(peak)}, more than {1 - FREE:.0%} of "
                f"{limit / 1e9:.2f} GB; leave it out (data.max_seconds), shard the model "
                "(parallel.strategy=fsdp), or set train.gradient_checkpointing or a larger "
                "parallel.memory_gb"
            )
        if world.gather(time.monotonic() - begun)[0] > TIME_S:
            break
    return search.fits


def limit_of(config: Config, world: World) -> int:
    """Bytes that a worker may use: `parallel.memory_gb`, else the GPU's memory.

    Raises UserError on a CPU without that key.
    """
    if config.parallel.memory_gb is not None:
        return int(config.parallel.memory_gb * 1e9)
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    raise UserError("data.tokens_per_batch: auto on CPU needs a limit: set parallel.memory_gb")


class Search:
    """Which budget to try next, from the peaks of those that were tried.

    fits: the largest known to fit; 0: none yet.
    """

    def __init__(self, least: int, most: int, room: float, first: tuple[int, float]) -> None:
        """room: bytes. first: a budget below `least` and its peak."""
        self.least, self.most, self.room = least, most, room
        self.fits = 0
        self._fails: int | None = None
        self._points = [first]  # the last two that fit

    def tell(self, budget: int, peak: float) -> None:
        """A budget's peak in bytes."""
        if peak > self.room:
            self._fails = budget
            return
        self.fits = budget
        self._points = [self._points[-1], (budget, peak)]

    def next(self) -> int | None:
        """None: `fits` is close to the largest, or nothing fits."""
        if not self.fits:
            return self.least if self._fails is None else None
        if self._fails is not None:
            aim = min(self._reach(), self._fails - CLOSE * self._fails)
            aim = max(aim, (self.fits + self._fails) / 2)
        else:
            aim = min(self._reach(), GROWTH * self.fits, self.most)
        budget = int(aim) // MULTIPLE * MULTIPLE
        if self._fails is not None and budget >= self._fails:
            return None
        near = budget - self.fits <= CLOSE * self.fits
        return None if (near and budget < self.most) or budget <= self.fits else budget

    def _reach(self) -> float:
        """Where the line through the last two points meets the room."""
        (first, low), (last, high) = self._points[-2], self._points[-1]
        slope = (high - low) / (last - first)
        return last + (self.room - high) / slope if slope > 0 else float(self.most)


class _Trials:
    """Steps with a budget, and the memory they take."""

    def __init__(self, config: Config, factory: Factory, lengths: Lengths, world: World) -> None:
        self.config, self.factory, self.world = config, factory, world
        self.lengths = lengths
        self._static = one_shape(config, world.device)
        self._held: Any = None
        self._build()

    def _build(self) -> None:
        self.speech_model, self.strategy = self.factory()
        self.strategy.module.train()

    def smallest(self) -> tuple[int, float]:
        """The budget of the smallest micro-batch, and its peak: state and gradients."""
        batch = self._batch(1, 0)
        self._step(batch)  # makes the optimizer's state
        if self.world.device.type == "cpu":
            stager = BlockingAsyncStager(cache_staged_state_dict=False)
            self._held = stager.stage(dict(self.strategy.state()))
        restart_peak(self.world.device)
        self._step(batch)
        return int(batch.lengths.sum()), self._worst(peak_bytes(self.world.device))

    def peak(self, budget: int) -> float:
        """Bytes at the peak of steps with micro-batches of this budget; infinite: ran out."""
        found = 0.0
        audio = self.config.data.audio_per_batch
        kinds = {self.lengths.longest, self.lengths.middle, self.lengths.shortest}
        for length in sorted(kinds, reverse=True):
            restart_peak(self.world.device)
            try:
                batch = self._batch(self.lengths.count(length, budget, audio), length)
                self._step(batch, Static(budget) if self._static else None)
                found = max(found, peak_bytes(self.world.device))
            except torch.OutOfMemoryError:
                found = float("inf")
            found = self._worst(found)
            if found == float("inf"):
                # What is half done, under sharding too, is not to be gone on with.
                self.speech_model = self.strategy = None  # type: ignore[assignment]
                restart_peak(self.world.device)
                self._build()
                return found
        return found

    def _worst(self, peak: float) -> float:
        return max(self.world.gather(peak))

    def _step(self, batch: MicroBatch, static: Static | None = None) -> None:
        """A whole step that leaves the weights alone. With several turns a worker the second one
        finds the gradients of the first. static: shapes of packed rows."""
        turns = [turn_of(self.speech_model, batch, static)] * min(
            2, self.world.turns(self.config.data.lanes)
        )
        step = StepBatch(0, 1, {}, turns)
        counts = {name: found * self.world.size for name, found in step.counts().items()}
        forward_backward(self.strategy, self.world, step, self.speech_model.tasks, counts, 0)
        self.strategy.step(0.0)

    def _batch(self, count: int, length: int) -> MicroBatch:
        sequences = [_sequence(self.speech_model, length) for _ in range(count)]
        return MicroBatch.join(0, 1, 0, sequences)


def _sequence(speech_model: SpeechModel, length: int) -> Sequence:
    """An example of `length` positions, at least 2. After a clip, where the model hears one, all of
    it is supervised. Where the encoder pays for the length of a clip, the clip fills it."""
    if not speech_model.writes:
        whole = speech_model.full_document(length)
        labels = whole.input_ids.copy()
        return Sequence("probe", "probe", whole.input_ids, labels, whole.arrays)
    dummy = speech_model.full_document(length - 1)
    if len(dummy.input_ids) > max(length, len(speech_model.dummy_document().input_ids)):
        dummy = speech_model.dummy_document()
    length = max(length, len(dummy.input_ids))
    ids = np.full(length, speech_model.stop_ids[0], np.int32)
    labels = ids.copy()
    if dummy.arrays:
        ids[: len(dummy.input_ids) - 1] = dummy.input_ids[:-1]
        labels[: len(dummy.input_ids) - 1] = -100
    return Sequence("probe", "probe", ids, labels, dummy.arrays)


def peak_bytes(device: torch.device) -> float:
    """The most memory in use since `restart_peak`: of the GPU, whoever uses it, or of this
    process (VmHWM)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        return float(others + torch.cuda.max_memory_reserved(device))
    return host_peak() or 0.0  # `restart_peak` has seen to it that there is one


def restart_peak(device: torch.device) -> None:
    """Give back what is free, and measure from here on. Raises UserError without Linux's /proc."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except (OSError, AttributeError) as error:
        raise UserError(
            f"data.tokens_per_batch: auto cannot measure a process's memory here ({error}); "
            "give a number"
        ) from error


def _up(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def _gb(peak: float) -> str:
    return f"{peak / 1e9:.2f} GB" if peak < float("inf") else "all there is"
