"""Ends a training process that makes no progress: its supervisor starts it again.

A collective whose other side is frozen, a deadlock, a filesystem that does not answer: none of
them raises, and a thread stuck in one cannot be stopped from within Python. The process can.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

EXIT_CODE = 75  # "temporary failure" of sysexits.h: try again


class Watchdog:
    """A thread that calls `hung` and then ends the process when `beat` stays away."""

    def __init__(self, timeout_s: float, hung: Callable[[str], None]) -> None:
        """hung: told the reason, in one line; gets a second to pass it on.

        timeout_s: the longest time between two beats; noticed up to a tenth later.
        """
        self.timeout_s = timeout_s
        self._hung = hung
        self._last, self._doing = time.monotonic(), "starting"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def beat(self, doing: str) -> None:
        """There was progress; `doing` is what comes next, for the message."""
        self._last, self._doing = time.monotonic(), doing

    def close(self) -> None:
        """The work is done: stop watching."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(min(1.0, self.timeout_s / 10)):
            now = time.monotonic()
            if now - before > self.timeout_s / 2:
                self._last = now  # this process was frozen itself, and has just come back
            before = now
            silent = now - self._last
            if silent > self.timeout_s:
                self._end(
                    f"no progress for {silent:.0f} s while {self._doing} (parallel.timeout_s="
                    f"{self.timeout_s:g})"
                )

    def _end(self, reason: str) -> None:
        print(f"{reason}; this worker ends, the threads stood at:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        tell = threading.Thread(target=self._hung, args=(reason,), daemon=True)
        tell.start()
        tell.join(timeout=1.0)
        os._exit(EXIT_CODE)
