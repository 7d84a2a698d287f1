"""One page of a run, a sweep or several runs: see `raysft.command.REPORT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysft import command
from raysft.cli import guarded


def main(argv: Sequence[str]) -> None:
    """What `raysft report` does."""
    command.report(argv, "python jobs/report.py")


if __name__ == "__main__":
    guarded(main)
