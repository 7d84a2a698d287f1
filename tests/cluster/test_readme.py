"""README's commands and snippets are run as they stand, in a folder that looks like the repository.

Only the length of training is shortened.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raysft.config import load_config
from tests.cluster.conftest import ROOT
from tests.support import jobs

README = (ROOT / "README.md").read_text()
SHORT = ["train.max_steps=6", "evaluate.every=0", "evaluate.max_new_tokens=2"]

pytestmark = pytest.mark.usefixtures("joined")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in a process of its own."""
    words = (sys.executable, *words)
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_commands_and_python_run_as_written(tmp_path: Path) -> None:
    for name in ("jobs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in "".join(blocks("sh")).splitlines():
        first, *words = shlex.split(line, comments=True)
        assert first == "python"
        if words[0].startswith("jobs/"):
            job, short = Path(words[0]).stem, SHORT if "sft.py" in line else []
            done = jobs.call(job, *words[1:], *short, cwd=tmp_path)
        else:
            done = run(*words, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs" / "spoken_digits_asr" / "eval.jsonl").is_file()
    (snippet,) = blocks("python")
    done = run("-c", snippet, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_configs_are_valid_once_they_name_a_source_and_a_model(tmp_path: Path) -> None:
    found = blocks("yaml")
    assert found
    for number, text in enumerate(found):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert load_config(path).model.path == yaml.safe_load(text)["model"]["path"]


def test_the_tree_names_every_module_that_is_there() -> None:
    for path in sorted((ROOT / "raysft").rglob("*.py")):
        place = path.relative_to(ROOT / "raysft")
        known = place.name == "__init__.py" or place.name in README
        known = known or f"{place.parts[0]}/" in README or f"{'/'.join(place.parts[:2])}/" in README
        assert known or place.name in ("errors.py",), f"README's tree lacks {place}"
