"""Every benchmark has a quick run that leaves real results alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
QUICK = {"padding"}  # the others: many processes, or many seconds
SHARED = {"results_io", "local_cluster", "gpu_kernels"}  # what benchmarks share
CALL = "gpu_call"  # which writes no results here
NAMES = [
    pytest.param(path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])
    for path in sorted(FOLDER.glob("*.py"))
    if path.stem not in {*SHARED, CALL}
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


@pytest.mark.slow
def test_every_section_of_the_gpu_call_runs_small_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / f"{CALL}.py")]
    small = {"CPU": "1", "OUT": str(tmp_path), "LIMIT": "2000"}
    done = subprocess.run(
        command, env={**os.environ, **small}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {name: section for line in lines for name, section in line.items()}
    assert {"experts", "experts_step", "lora", "full"} <= found.keys()
    assert "failed" not in json.dumps(lines), lines
    # By each backend that is here, against the loop, and adapters in both forms.
    assert found["experts_step"]["full, torch"]["faster_than_loop"] > 0
    for way in ("full, loop", "full, torch", "lora, split", "lora, materialised"):
        assert found["experts"][f"{way}, 128 skewed"]["of_matmul"] > 0
