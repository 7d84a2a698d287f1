"""As `worlds`, but every worker builds the whole model before it is sharded."""

from __future__ import annotations

from pathlib import Path

from raysft import worker
from tests.support import worlds


def main(size: int, kill_at: int, paths: list[Path]) -> None:
    """What `worlds.run` calls."""
    worker.reads_later = lambda config: False
    worlds.main(size, kill_at, paths)
