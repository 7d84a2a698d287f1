"""A run's page, written anew at every evaluation while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.page import build
from raysft.page.facts import NothingYet

log = logging.getLogger(__name__)


def with_page(progress: Callable[[JsonObject], None], folder: Path) -> Callable[[JsonObject], None]:
    """`progress`, which is told what a run reports, and the page of the run in `folder`."""

    def shown(line: JsonObject) -> None:
        progress(line)
        if "eval" in line:
            write_page(folder)

    return shown


def write_page(folder: Path) -> None:
    """Write the page of a run or a sweep, once a step is logged; what goes wrong with it is warned
    of: it is no reason to end either."""
    try:
        build.write([folder])
    except NothingYet:  # evaluated before log.every
        return
    except (UserError, OSError) as error:
        log.warning("%s was not written: %s", build.NAME, error)
