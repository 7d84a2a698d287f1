"""Text of clips, by a run or a model's folder: see `raysft.command.TRANSCRIBE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysft import command
from raysft.cli import guarded


def main(argv: Sequence[str]) -> None:
    """What `raysft transcribe` does."""
    command.transcribe(argv, "python jobs/transcribe.py")


if __name__ == "__main__":
    guarded(main)
