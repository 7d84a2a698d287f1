"""What a logger keeps elsewhere than figures, which go on without it."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class Apart:
    """Does what may fail by itself, until it has failed once."""

    def __init__(self, name: str) -> None:
        """name: of the logger, for the line that says so."""
        self._name, self._failed = name, False

    def __call__(self, do: Callable[[], None]) -> None:
        """Do it, or say why not."""
        if self._failed:
            return
        try:
            do()
        except Exception as error:  # noqa: BLE001 - whatever it is: figures go on
            self._failed = True
            why = " ".join(str(error).split())[:300] or type(error).__name__
            log.warning("%s: answers and files are not stored, only figures: %s", self._name, why)
