"""Evaluate a checkpoint of a run: WER and CER by generation, loss and perplexity by task.

python jobs/evaluate.py RUN [--data SOURCE] [--step N|best|last] [key=value ...] [--debug]

RUN is a run's folder. SOURCE replaces its data.eval. Without --step it is the newest checkpoint;
best: by checkpoint.best. Figures, every reference and hypothesis, and the config they were made
with go to a new folder below RUN/evaluations; nothing of the run is changed, be it under way.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysft import paths
from raysft.cli import ProgressLine, guarded, parse
from raysft.run.folder import reopen


def main(argv: Sequence[str]) -> None:
    """Load the run's config, replace what the command line says, evaluate."""
    arguments = parse(argv, __doc__ or "", positional=1, flags=["data=", "step="])
    overrides = list(arguments.overrides)
    if "data" in arguments.flags:
        overrides.append(f"data.eval={json.dumps([arguments.flags['data']], ensure_ascii=False)}")
    run = paths.argument(arguments.positional[0], "RUN")
    step = str(arguments.flags.get("step", "last"))
    config = reopen(run, [*overrides, "checkpoint.resume=auto"])

    from raysft.driver import preflight as prepare

    config = prepare.check_evaluation(config, run, step)

    from raysft.driver import launch  # imports Ray and torch, 10 s: not before a mistake is said
    from raysft.driver.session import ray_session

    with ray_session():
        outcome = launch.evaluate(config, run.absolute(), ProgressLine(), step)
    print(outcome.describe())


if __name__ == "__main__":
    guarded(main)
