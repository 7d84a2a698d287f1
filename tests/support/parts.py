"""The parts of `make test-all PART=NAME`: every test file is in one, so that a machine can run the
whole in turns, or several machines side by side."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"

PARTS: dict[str, tuple[str, ...]] = {
    "failures": (
        "cluster/test_failures.py",
        "cluster/test_node_failures.py",
        "properties/test_faults.py",
        "properties/test_kill_while_saving.py",
        "properties/test_one_owner.py",
        "properties/test_simulated_runs.py",
        "unit/run",
    ),
    "cluster": ("cluster",),
    "exactness": ("properties", "unit/train", "unit/parallel", "unit/losses"),
    "models": ("unit/models", "unit/adapters", "unit/families"),
    "data": ("unit/data",),
    "gpu": ("gpu",),
    "rest": ("unit",),
}
"""Name -> folders and files of `tests`; a file is in the first that has it."""


def part_of(path: Path) -> str:
    """The part of a test file."""
    place = path.relative_to(TESTS)
    return next(
        name
        for name, members in PARTS.items()
        if any(place.is_relative_to(member) for member in members)
    )
