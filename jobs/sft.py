"""Train, or continue the run if its folder exists.

python jobs/sft.py CONFIG.yaml [key=value ...] [--dry-run] [--debug]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysft.cli import ProgressLine, guarded, parse
from raysft.config import load_config


def main(argv: Sequence[str]) -> None:
    """Everything that can be found wrong is, before Ray starts."""
    arguments = parse(argv, __doc__ or "", positional=1, flags=["dry-run"])
    config = load_config(arguments.positional[0], arguments.overrides)
    show = ProgressLine()
    show.say(f"{arguments.positional[0]}: checking config, sources and model")

    from raysft.driver import preflight as prepare

    dry = "dry-run" in arguments.flags
    checked = prepare.check(config, writes=not dry)

    from raysft.driver import launch  # imports Ray and torch, 10 s: not before a mistake is said
    from raysft.driver.session import destination, ray_session

    show.say(destination())
    with ray_session():
        if dry:
            print(launch.dry_run(checked, show))
            return
        outcome = launch.run(config, show)
    print(outcome.describe())


if __name__ == "__main__":
    guarded(main)
