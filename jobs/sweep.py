"""Try values of keys, ranked by an evaluation: see `raysft.command.SWEEP`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysft import command
from raysft.cli import guarded


def main(argv: Sequence[str]) -> None:
    """What `raysft sweep` does."""
    command.sweep(argv, "python jobs/sweep.py")


if __name__ == "__main__":
    guarded(main)
