"""Evaluate the newest checkpoint of a run: WER and CER by generation, loss and perplexity by task.

python jobs/evaluate.py RUN [--data SOURCE] [key=value ...] [--debug]

RUN is a run's folder. SOURCE replaces its data.eval.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysft.cli import ProgressLine, guarded, parse
from raysft.rundir import reopen


def main(argv: Sequence[str]) -> None:
    """Load the run's config, replace what the command line says, evaluate."""
    arguments = parse(argv, __doc__ or "", positional=1, flags=["data="])
    overrides = list(arguments.overrides)
    if "data" in arguments.flags:
        overrides.append(f"data.eval=[{arguments.flags['data']!r}]")
    config = reopen(Path(arguments.positional[0]), overrides)

    from raysft import launch, prepare
    from raysft.session import ray_session

    prepare.check(config)
    with ray_session():
        outcome = launch.run(config, ProgressLine(), task="evaluate")
    print(outcome.describe())


if __name__ == "__main__":
    guarded(main)
