"""A sweep's table and page, written anew while its trials train."""

from __future__ import annotations

import logging
import threading

from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.page.live import write_page
from raysft.sweep import table
from raysft.sweep.folder import SweepFolder

log = logging.getLogger(__name__)

EVERY_S = 10.0


class Live:
    """results.csv and report.html, soon after each time that there is something new, and at most
    every `every_s` seconds. Written beside whoever tells it, who waits for nothing and hears of no
    failure: those are warned of."""

    def __init__(
        self, sweep: SweepFolder, metric: str, mode: str, every_s: float = EVERY_S
    ) -> None:
        self._sweep, self._metric, self._mode, self._every_s = sweep, metric, mode, every_s
        self._new, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="page")
        self._thread.start()

    def __getstate__(self) -> JsonObject:
        """Nothing: Ray Tune packs all that it is given, for a use that there is not."""
        return {}

    def new(self) -> None:
        """There is something new."""
        self._new.set()

    def close(self) -> None:
        """Write no more; what is being written is written to its end."""
        self._closed.set()
        self._new.set()
        self._thread.join()

    def _run(self) -> None:
        while self._new.wait() and not self._closed.is_set():
            self._new.clear()
            try:
                found = table.rows(self._sweep, self._metric, self._mode)
                table.write_csv(self._sweep.path / "results.csv", found, self._metric)
                write_page(self._sweep.path)
            except (UserError, OSError) as error:
                log.warning("results.csv was not written: %s", error)
            self._closed.wait(self._every_s)
