"""Write the newest checkpoint of a run as a folder that transformers loads by from_pretrained.

python jobs/export.py RUN OUT [--debug]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysft.cli import guarded, parse


def main(argv: Sequence[str]) -> None:
    """Needs neither Ray nor the training data."""
    arguments = parse(argv, __doc__ or "", positional=2, keys=False)

    from raysft.export import export_run

    run, out = (Path(word) for word in arguments.positional)
    print(f"exported step {export_run(run, out)} to {out}")


if __name__ == "__main__":
    guarded(main)
