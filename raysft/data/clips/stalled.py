"""Reads that may never return: a mount that is gone, a disk that hangs, a decoder in a loop.

Stands around `audio.probe` (index) and `audio.load` (data tasks). Every read runs in a daemon
thread and is given `data.read_timeout_s`; then the thread is abandoned, the clip is refused as
any unusable one, and reading goes on in a fresh thread. Such a clip is remembered in the run's
folder, for whether a read returns in time is chance, and a run must decide the same at every
restart and on every node:

    stalled/<hash of the path>.json   {"path": ..., "reason": ...}; deleted, the clip is read again

Reads that fail at once (OSError) say nothing of the clip either: they are tried again, here and not
in the thread, so that no pause counts as a stall (see `patience`); then they end the run.

Costs 20 to 35 us a call for the way into the thread and back, whatever the number of clips in it,
and a listing of the folder a chunk of works. A thread keeps up to 32 MB for its next clip.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np

from raysft import patience
from raysft.data.clips.audio import Limits
from raysft.data.example import Audio
from raysft.errors import BadExample, UserError

# A process with so many threads that hang had better be replaced (`stuck`): each keeps its stack,
# a file handle and what it has read, and on some mounts one of a few slots for requests.
MOST_STUCK = 8
# So many clips one after the other without an answer are no bad clips but a storage that is gone.
# At the default of 60 s that is 4 minutes, less than it takes a waiting worker to count as hung.
IN_A_ROW = 4
# The wait is cut into slices, so that a process that was itself stopped for a while (SIGSTOP, a
# paused machine) finds one slice gone when it wakes, not all the time its read had.
_SLICES = 8
_KEPT = 16 << 20  # bytes

LOST = (
    ". Where a clip is lost for good, put an empty file in its place: its example is then left "
    "out, and named in quarantine.jsonl"
)

_Clip = TypeVar("_Clip", Audio, str)
_Result = TypeVar("_Result")
# A function, what it is called with, and the list that takes what comes of it.
_Job = tuple[Callable[[Any], object], Sequence[object], list[Any]]
_idle: list[_Helper] = []
_abandoned: list[_Helper] = []


def stuck() -> int:
    """Threads of this process that were given up and still hang in a read.

    Where it reaches MOST_STUCK, end the process between two pieces of work and start another.
    """
    _abandoned[:] = [helper for helper in _abandoned if helper.is_alive()]
    return len(_abandoned)


class ClipReader:
    """Calls functions that read a clip, and gives each call `limits.read_timeout_s`."""

    def __init__(self, limits: Limits, in_a_row: int = IN_A_ROW) -> None:
        """in_a_row: clips without an answer, one after the other, at which it raises UserError."""
        self._seconds = limits.read_timeout_s
        self._folder = None if limits.stalled is None else Path(limits.stalled)
        self._in_a_row = in_a_row
        self._row = 0
        self._known: frozenset[str] = frozenset()
        self.refresh()

    def refresh(self) -> None:
        """Look which clips others (or this process before a restart) have found to stall."""
        if self._folder is not None:
            folder = self._folder
            try:
                self._known = frozenset(patience.patiently(lambda: os.listdir(folder), folder))
            except FileNotFoundError:
                self._known = frozenset()
            except OSError as error:
                raise patience.away(folder, error) from error

    def call(self, function: Callable[[_Clip], _Result], clip: _Clip) -> _Result:
        """function(clip); clip: or its path. Raises what it raises, BadExample where it does not
        return in time, and UserError where that happens to one clip after the other, or where its
        storage goes on failing (OSError)."""
        found = self.each(function, [clip])[0]
        if isinstance(found, BadExample):
            raise found
        return found

    def each(
        self, function: Callable[[_Clip], _Result], clips: Sequence[_Clip]
    ) -> list[_Result | BadExample]:
        """[function(clip) or the BadExample it raised, for clip in clips]: one thread for all."""

        found: list[_Result | BadExample] = []
        while len(found) < len(clips):
            found += self.some(function, clips[len(found) :])
        return found

    def some(
        self, function: Callable[[_Clip], _Result], clips: Sequence[_Clip]
    ) -> list[_Result | BadExample]:
        """As `each`, of the first clips: up to the first that does not return in time."""

        def read(clip: _Clip) -> _Result:
            self._refuse_known(_path(clip))
            return function(clip)

        found, stalled = _run(read, clips, self._seconds)
        if found:
            self._row = 0
        if stalled:
            found.append(self._remember(_path(clips[len(found)])))
        for place, result in enumerate(found):
            if isinstance(result, OSError):
                found[place] = self._again(read, clips[place], result)
            elif isinstance(result, Exception) and not isinstance(result, BadExample):
                raise result
        return found

    def _again(
        self, read: Callable[[_Clip], _Result], clip: _Clip, error: OSError
    ) -> _Result | BadExample:
        """A read that failed, tried again: its result or its BadExample."""
        first = [error]

        def once() -> _Result | BadExample:
            if first:
                raise first.pop()
            done, stalled = _run(read, [clip], self._seconds)
            if stalled:
                return self._remember(_path(clip))
            if isinstance(done[0], Exception) and not isinstance(done[0], BadExample):
                raise done[0]
            return done[0]

        return patience.known(once, _path(clip), LOST)

    def _refuse_known(self, path: str) -> None:
        if self._folder is not None and _name(path) in self._known:
            try:
                reason = json.loads((self._folder / _name(path)).read_bytes())["reason"]
            except (FileNotFoundError, ValueError, KeyError):  # deleted meanwhile, or half-written
                return
            raise BadExample(reason, "stalled")

    def _remember(self, path: str) -> BadExample:
        self._row += 1
        reason = f"{path}: no answer within {self._seconds:g} s (data.read_timeout_s)"
        if self._folder is not None:
            mark = self._folder / _name(path)
            reason += f": see that its storage answers, and delete {mark} to have it read again"
            _write(mark, {"path": path, "reason": reason})
            self._known |= {mark.name}
        if self._row >= self._in_a_row:
            raise UserError(
                f"{path}: no answer within {self._seconds:g} s (data.read_timeout_s), nor from "
                f"{self._row - 1} clips before it: see that its storage is mounted and answers on "
                f"{socket.gethostname()}, then start again"
                + (f" (delete {self._folder} to have them read again)" if self._folder else "")
            )
        return BadExample(reason, "stalled")


class _Helper(threading.Thread):
    """A thread that can be left behind: it does not keep the process from ending."""

    def __init__(self) -> None:
        super().__init__(name="clip reader", daemon=True)
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.finished: SimpleQueue[None] = SimpleQueue()
        self.start()

    def run(self) -> None:
        """Serve jobs until one of them is None."""
        # glibc hands a thread's memory back after every clip, and 230 pages of it came anew with
        # the next (1 ms for 3 s at 22 kHz). Once this much was allocated and freed, it keeps it.
        np.empty(_KEPT, np.uint8)
        while (job := self.jobs.get()) is not None:
            function, items, done = job
            for item in items:
                try:
                    done.append(function(item))
                except Exception as error:  # noqa: BLE001 - raised in the thread that asked
                    done.append(error)
            del job, function, items, done  # else the last clip stays until the next one comes
            self.finished.put(None)


def _run(
    function: Callable[[_Clip], object], items: Sequence[_Clip], seconds: float
) -> tuple[list[Any], bool]:
    """What the first items came to, and whether the one after them did not return in time."""
    try:
        helper = _idle.pop()
    except IndexError:
        helper = _Helper()
    done: list[Any] = []
    helper.jobs.put((function, items, done))
    seen = waited = 0
    while waited < _SLICES:
        try:
            helper.finished.get(timeout=seconds / _SLICES)
        except Empty:
            count = len(done)
            waited = waited + 1 if count == seen else 0
            seen = count
            continue
        _idle.append(helper)
        return done, False
    helper.jobs.put(None)  # it ends if ever it returns
    _abandoned.append(helper)
    return done[:seen], True


def _forget() -> None:
    _idle.clear()
    _abandoned.clear()


os.register_at_fork(after_in_child=_forget)


def _path(clip: Audio | str) -> str:
    return clip if isinstance(clip, str) else clip.path


def _name(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:32] + ".json"


def _write(mark: Path, content: dict[str, str]) -> None:
    """Whole or not at all. Raises UserError where the folder cannot be written."""
    temporary = mark.with_name(f".{mark.name}.{uuid.uuid4().hex}")

    def put() -> None:
        mark.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content))
        os.replace(temporary, mark)

    try:
        patience.patiently(put, mark)
    except OSError as error:
        raise UserError(
            f"run.storage_path: cannot remember in {mark.parent} that {content['path']} did not "
            f"answer: {error.strerror or error}; make it writable on {socket.gethostname()}"
        ) from None
