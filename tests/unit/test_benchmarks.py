"""Every benchmark has a quick run that leaves real results alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
QUICK = {"padding"}  # the others: many processes, or many seconds
SHARED = {"results_io", "local_cluster"}  # what benchmarks share
NAMES = [
    pytest.param(path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])
    for path in sorted(FOLDER.glob("*.py"))
    if path.stem not in SHARED
]


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_writes_numbers_and_a_figure_where_it_is_told(
    name: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300, stdout=subprocess.PIPE)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_quick.json", f"{name}_quick.png"}
    written = json.loads((tmp_path / f"{name}_quick.json").read_text())
    assert written["benchmark"] == name and written["quick"] is True
    assert written["machine"]["cores"] >= 1
