"""From plan to ready step batches: the worker's side of the data path.

The plan says which rows each of this worker's lanes takes; a reader (tasks of Ray, or in process)
turns them into micro-batches; a thread lays these out for the model and keeps a few ready.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch

from raysft.config.schema import Config
from raysft.data.example import MicroBatch
from raysft.data.plan.generations import Generations
from raysft.data.plan.plan import Cursor, PlannedStep
from raysft.data.read.reader import Work
from raysft.json_types import JsonObject
from raysft.models.base import SpeechModel
from raysft.models.layout import Static
from raysft.parallel import World
from raysft.train.step import StepBatch, Turn

Read = Callable[[Iterator[Work]], Iterator[MicroBatch]]
LayOut = Callable[[MicroBatch], Turn]


class Feed:
    """Step batches of one worker, from any cursor; at most `prefetch` micro-batches are held."""

    def __init__(
        self,
        plan: Generations,
        lanes: int,
        speech_model: SpeechModel,
        read: Read,
        world: World,
        total_steps: int,
        prefetch: int,
        static: Static | None = None,
        lay_out: LayOut | None = None,
    ) -> None:
        """static: shapes of packed rows; None: of what a micro-batch holds. lay_out: default:
        `turn_of`."""
        self.plan = plan
        self.read = read
        self.world = world
        self.total_steps = total_steps
        self.speech_model = speech_model
        self.lay_out = lay_out or partial(turn_of, speech_model, static=static)
        self.lanes = world.lanes(lanes)
        self.turns = world.turns(lanes)
        self._ready: queue.Queue[StepBatch | BaseException | None] = queue.Queue(
            maxsize=max(1, prefetch // self.turns)
        )
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, cursor: JsonObject | None) -> Iterator[StepBatch]:
        """Step batches from the cursor (None: the start) to the last step."""
        start = self.plan.start() if cursor is None else Cursor.from_json(cursor)
        self._thread = threading.Thread(target=self._fill, args=(start,), daemon=True, name="feed")
        self._thread.start()
        while True:
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop reading ahead; returns once the thread has let go of the reader."""
        self._stop.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._ready.get(timeout=0.1)
            except queue.Empty:
                continue

    def _fill(self, start: Cursor) -> None:
        try:
            for batch in self._batches(start):
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the training thread, raised there
            self._put(error)

    def _put(self, item: StepBatch | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _batches(self, start: Cursor) -> Iterator[StepBatch]:
        planned: deque[PlannedStep] = deque()

        def works() -> Iterator[Work]:
            for step in self.plan.steps(start):
                if step.step > self.total_steps or self._stop.is_set():
                    return
                planned.append(step)
                for lane in self.lanes:
                    if len(step.lanes[lane]):
                        yield Work(step.epoch, step.step, lane, step.lanes[lane])

        read = self.read(works())
        held: MicroBatch | None = None
        try:
            while True:
                if not planned:  # pulling a micro-batch makes the reader plan ahead
                    held = next(read, None)
                    if not planned:
                        return
                step = planned.popleft()
                found = []
                for lane in self.lanes:
                    if not len(step.lanes[lane]):
                        found.append(MicroBatch.join(step.epoch, step.step, lane, []))
                        continue
                    batch = next(read) if held is None else held
                    held = None
                    assert (batch.step, batch.lane) == (step.step, lane), "out of order"
                    found.append(batch)
                yield self._assemble(step, found)
        finally:
            close = getattr(read, "close", None)
            if close is not None:
                close()

    def _assemble(self, step: PlannedStep, found: list[MicroBatch]) -> StepBatch:
        turns = [self.lay_out(batch) for batch in found]
        while len(turns) < self.turns:  # no such lane: a turn of weight zero
            lane = len(step.lanes) + len(turns)
            empty = MicroBatch.join(step.epoch, step.step, lane, [])
            turns.append(self.lay_out(empty))
        return StepBatch(step.epoch, step.step, step.after.to_json(), turns, found)


def one_shape(config: Config, device: torch.device) -> bool:
    """Whether packed rows are of one length (`train.static_shapes`); by default where that is worth
    what it computes for nothing: where memory or compiled code is kept by shapes, and rows are full
    but for 0.2% to 0.5% (a limit of audio may end them long before)."""
    asked = config.train.static_shapes
    worth = device.type == "cuda" or config.train.compile
    worth = worth and config.data.audio_per_batch is None
    return config.data.mode == "packed" and (worth if asked is None else asked)


def turn_of(speech_model: SpeechModel, batch: MicroBatch, static: Static | None = None) -> Turn:
    """A micro-batch laid out for the model, with what it counts. static: shapes of packed rows."""
    laid_out = speech_model.collate(batch, static=static)
    tokens = float(batch.lengths.sum())
    counts = {
        "tokens": tokens,
        "positions": float(speech_model.computed(laid_out)) if tokens else 0.0,
        "examples": float(len(batch.ids)),
        "audio_seconds": batch.seconds,
        "quarantined": float(len(batch.quarantined)),
    }
    return Turn(batch.lane, laid_out, counts | speech_model.counts(batch))
