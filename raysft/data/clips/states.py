"""What a measured clip was like: its size and time of change, by which a replaced one is noticed.

Kept with the part of each data file (part.py), compressed, 20 to 30 bytes an example. At each start
of a job the clips of cached parts are looked at again, in parallel as they were measured: a stat
each instead of opening the clip, so about a third of the header pass on network storage and a
twentieth on a local disk; no data file is parsed for it. Clips of another size or time are
measured again. Within a start nothing is looked at twice: workers that restart do not come here.
"""

from __future__ import annotations

import json
import os
import resource
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from raysft import patience, stores
from raysft.data.clips.audio import Limits
from raysft.data.clips.stalled import IN_A_ROW, ClipReader
from raysft.data.example import Audio
from raysft.errors import BadExample

# Headers on shared storage cost a round trip each: waiting for several at once hides it.
THREADS = 8
_AT_A_TIME = 32  # by one of them: the way to its reader and back costs as much as a third
_RACY_NS = 2_000_000_000  # a clip written just now can change once more within the clock's grain
_UNKNOWN = -1

_Clip = TypeVar("_Clip", Audio, str)
_Result = TypeVar("_Result")


@dataclass
class States:
    """Clips of examples: one entry a clip. line: of the example in its data file."""

    line: list[int] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    mtime_ns: list[int] = field(default_factory=list)

    def add(self, line: int, path: str, size: int, mtime_ns: int) -> None:
        """A clip as it was measured, just now."""
        racy = time.time_ns() - mtime_ns < _RACY_NS
        self.line.append(line)
        self.path.append(path)
        self.size.append(size)
        self.mtime_ns.append(_UNKNOWN if racy else mtime_ns)

    def pack(self) -> bytes:
        """Compressed."""
        return zlib.compress(json.dumps(self.__dict__).encode(), 1)

    @classmethod
    def unpack(cls, data: bytes) -> States:
        """What was packed."""
        return cls(**json.loads(zlib.decompress(data)))


@dataclass(frozen=True, slots=True)
class Piece:
    """Clips of some lines of a data file, packed.

    data: of States. shift: how many lines further down they are by now. low, high: their first and
    last line, as they are now.
    """

    data: bytes
    low: int
    high: int
    shift: int = 0

    @classmethod
    def of(cls, states: States, shift: int = 0) -> tuple[Piece, ...]:
        """One piece; none where there are no clips."""
        if not states.line:
            return ()
        low, high = min(states.line) + shift, max(states.line) + shift
        return (cls(states.pack(), low, high, shift),)

    def split(self, move: Callable[[int], int | None]) -> list[Piece]:
        """Its clips as many lines further down as `move` says of each line, a piece for each
        distance; without those of which it says None."""
        found: dict[int, States] = {}
        for line, *clip in zip(*States.unpack(self.data).__dict__.values()):
            lines = move(line + self.shift)
            if lines is not None:
                columns = found.setdefault(self.shift + lines, States()).__dict__.values()
                for values, value in zip(columns, (line, *clip)):
                    values.append(value)
        return [piece for shift, states in found.items() for piece in Piece.of(states, shift)]

    def moved(self, lines: int) -> Piece:
        """The same, as many lines further down."""
        low, high, shift = self.low + lines, self.high + lines, self.shift + lines
        return Piece(self.data, low, high, shift)


def changed(piece: Piece, limits: Limits) -> list[int]:
    """Lines of the examples whose clips are not as they were, or are gone. A clip whose storage
    does not answer counts as it was: nothing is known of it, and reading it will tell."""
    states = States.unpack(piece.data)
    now = at_once(state_of, sorted(set(states.path)), limits)
    before = zip(states.line, states.path, zip(states.size, states.mtime_ns))
    return sorted(
        {
            line + piece.shift
            for line, path, state in before
            if now[path] != state and not isinstance(now[path], BadExample)
        }
    )


def state_of(path: str) -> tuple[int, int] | None:
    """Size and time of change (ns); None where there is no such file. Raises OSError where its
    storage does not say."""
    try:
        if stores.is_remote(path):
            return stores.status(path)
        found = os.stat(path)
    except ValueError:
        return None
    except OSError as error:
        if patience.failing(error):
            raise
        return None
    return found.st_size, found.st_mtime_ns


def at_once(
    function: Callable[[_Clip], _Result], clips: Sequence[_Clip], limits: Limits
) -> dict[_Clip, _Result | BadExample]:
    """{clip: function(clip), or the BadExample it raised}. clips: or their paths.

    One after the other while their storage answers at once: threads that all want the interpreter
    take three times as long as one of them. Several are waited for from there on where it does not.
    """
    reader = ClipReader(limits, IN_A_ROW * THREADS)
    waited = _Waited()
    found: list[_Result | BadExample] = []
    while len(found) < len(clips) and not waited.long:
        these = clips[len(found) : len(found) + min(_AT_A_TIME, 1 + len(found))]
        some = reader.some(waited.by(function, len(these)), these)
        found += some
        if len(some) < len(these):
            break  # one of them does not answer
    left = range(len(found), len(clips), _AT_A_TIME)
    if left:
        with ThreadPoolExecutor(THREADS, "clips") as pool:
            batches = [clips[at : at + _AT_A_TIME] for at in left]
            for some in pool.map(lambda batch: reader.each(function, batch), batches):
                found += some
    return dict(zip(clips, found, strict=True))


def _sleeps() -> int:
    """Times that this thread has given up its core to wait for something."""
    if not hasattr(resource, "RUSAGE_THREAD"):  # not on macOS: as if it always did
        return time.monotonic_ns()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class _Waited:
    """How long calls have waited for what is no work of theirs: for storage."""

    LONG = 3e-4  # seconds a call, which is what a thread's share of the interpreter costs more

    def __init__(self) -> None:
        self._seconds, self._calls = 0.0, 0

    def by(self, function: Callable[[_Clip], _Result], calls: int) -> Callable[[_Clip], _Result]:
        """function, to be called so many times by one thread: its clock is read twice, for it
        costs as much as a stat."""
        left, began, slept = calls, 0.0, 0

        def timed(clip: _Clip) -> _Result:
            nonlocal left, began, slept
            if left == calls:
                began, slept = time.perf_counter() - time.thread_time(), _sleeps()
            left -= 1
            try:
                return function(clip)
            finally:
                if not left:
                    # A thread that only waits for its turn at a core does not sleep.
                    if 2 * (_sleeps() - slept) >= calls:
                        self._seconds += time.perf_counter() - time.thread_time() - began
                    self._calls += calls

        return timed

    @property
    def long(self) -> bool:
        """Whether that is more, a call, than waiting for several at once costs."""
        return self._seconds > self.LONG * self._calls
