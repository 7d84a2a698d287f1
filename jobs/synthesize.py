"""Waves of texts, by a run or an exported folder: see `raysft.command.SYNTHESIZE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysft import command
from raysft.cli import guarded


def main(argv: Sequence[str]) -> None:
    """What `raysft synthesize` does."""
    command.synthesize(argv, "python jobs/synthesize.py")


if __name__ == "__main__":
    guarded(main)
