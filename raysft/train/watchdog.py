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

from raysft.run.ownership import LEASE_S, Lease, Process

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
        _leave(reason, self._hung)


class Orphaned:
    """A thread that ends this worker's process where nobody wants its work any more: the run is
    another's, other workers have been started for it, or its driver is gone.

    Ray ends the workers of a driver that died, but not one whose node it has lost, nor at once.
    """

    def __init__(
        self,
        lease: Lease,
        driver: Process,
        ended: Callable[[str], None],
        silent_s: float = 2 * LEASE_S,
        every_s: float = 1.0,
    ) -> None:
        """ended: told the reason, in one line; gets a second to pass it on. silent_s: how long a
        driver of another machine may show no sign of life."""
        self._lease, self._driver, self._ended = lease, driver, ended
        self._silent, self._every = silent_s, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="orphaned")
        self._thread.start()

    def close(self) -> None:
        """The work is done: stop watching."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, since, before = None, time.monotonic(), time.monotonic()
        while not self._stop.wait(self._every):
            now = time.monotonic()
            if now - before > self._silent / 2:
                since = now  # this process was frozen itself, and has just come back
            before = now
            try:
                reason, beat = self._lease.lost(), self._lease.beat()
                here, gone = self._driver.here(), self._driver.gone()
            except (OSError, ValueError):
                since = now  # nobody can be heard just now
                continue
            if beat != seen:
                seen, since = beat, now
            if reason is None and gone:
                reason = f"the driver ({self._driver}) has ended"
            if reason is None and not here and now - since > self._silent:
                reason = f"no sign of life of the driver ({self._driver}) for {now - since:.0f} s"
            if reason is not None:
                print(f"{reason}: this worker ends", file=sys.stderr, flush=True)
                _leave(reason, self._ended)


def _leave(reason: str, told: Callable[[str], None]) -> None:
    """End this process; who should hear of it gets a second."""
    tell = threading.Thread(target=told, args=(reason,), daemon=True)
    tell.start()
    tell.join(timeout=1.0)
    os._exit(EXIT_CODE)
