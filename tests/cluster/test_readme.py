"""Commands and snippets of README and docs are run as they stand, in a folder that looks like the
repository.

Only the length of training is shortened.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from raysft.run.lines import read_lines
from tests.cluster.conftest import ROOT
from tests.support import documents, jobs
from tests.support.documents import Block, blocks

SHORT = ["train.max_steps=6", "evaluate.every=0", "evaluate.max_new_tokens=2"]
SAME_RUN = ("README.md", "docs/evaluation.md", "docs/failures.md")  # they go on with one run
TUTORIAL, SWEEPS = "docs/tutorial.md", "docs/sweeps.md"

pytestmark = pytest.mark.usefixtures("joined")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder in which commands find what they find in the repository."""
    for name in ("jobs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in a process of its own."""
    words = (sys.executable, *words)
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)


def commands(found: Iterable[Block]) -> list[tuple[Block, str]]:
    """Every command of these blocks, once: pages repeat those that one has just read."""
    lines = [(block, line) for block in found for line in block.text.splitlines() if line.strip()]
    first: dict[str, tuple[Block, str]] = {}
    for block, line in lines:
        first.setdefault(" ".join(shlex.split(line, comments=True)), (block, line))
    return [pair for words, pair in first.items() if words]


def do(block: Block, line: str, cwd: Path) -> None:
    """Run one command, which has to succeed."""
    first, *words = shlex.split(line, comments=True)
    assert first == "python", f"{block}: {line}"
    if words[0].startswith("jobs/"):
        job = Path(words[0]).stem
        short = SHORT if job in ("sft", "sweep") else []
        done = jobs.call(job, *words[1:], *short, cwd=cwd)
    else:
        done = run(*words, cwd=cwd)
    assert done.returncode == 0, f"{block}: {line}\n{done.stdout}{done.stderr}"


def test_commands_and_python_run_as_written(here: Path) -> None:
    for block, line in commands(b for page in SAME_RUN for b in blocks(page, "sh")):
        do(block, line, here)
    assert (here / "runs" / "spoken_digits_asr" / "eval.jsonl").is_file()
    (snippet,) = blocks("README.md", "python")
    done = run("-c", snippet.text, cwd=here)
    assert done.returncode == 0, done.stderr
    (again,) = blocks("docs/evaluation.md", "python")
    assert again.text == snippet.text


@pytest.mark.slow
def test_a_run_with_adapters_is_exported_as_written(here: Path) -> None:
    config, model = "examples/spoken_digits/asr.yaml", "model={path: base}"
    lora = ("run.name=my_run", model, "peft.method=lora", "peft.r=2", "evaluate.at_end=false")
    for job, *words in (
        ("sft", config, "run.name=base", "evaluate.at_end=false", *SHORT),
        ("export", "runs/base", "base"),
        ("sft", config, *lora, *SHORT),
    ):
        done = jobs.call(job, *words, cwd=here)
        assert done.returncode == 0, done.stderr
    for block, line in commands(blocks("docs/strategies.md", "sh")):
        do(block, line, here)


@pytest.mark.slow
def test_the_tutorial_runs_from_clips_to_a_folder_for_others(here: Path) -> None:
    for block in blocks(TUTORIAL, "python", "yaml", "sh"):
        name = documents.file_of(block)
        if block.language == "sh":
            for _, line in commands([block]):
                do(block, line, here)
        elif name is not None:
            (here / name).write_text(block.text)
        elif block.language == "python":
            with contextlib.chdir(here):
                exec(compile(block.text, str(block), "exec"), {})
    assert (here / "exported" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", documents.EXAMPLES)
def test_the_commands_of_the_examples_run_as_written(page: str, tmp_path: Path) -> None:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    made = shutil.ignore_patterns("units", "data")  # which the commands write
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=made)
    for block, line in commands(blocks(page, "sh")):
        do(block, line, tmp_path)
    if page != "examples/most/README.md":
        return
    for name, kinds in (("most", {"text", "audio"}), ("most_one_kind", {"all"})):
        run = tmp_path / "runs" / name
        (told,) = (line["tokens"] for line in read_lines(run / "experts.jsonl"))
        assert told.keys() == kinds
        (figures,) = read_lines(run / "eval.jsonl")
        assert {"wer/dev_asr", "wer/test_asr", "loss/tts", "loss/text"} <= figures.keys(), figures


@pytest.mark.slow
def test_a_sweep_and_its_best_run_as_written(here: Path) -> None:
    short = ["train.max_steps=4", "evaluate.every=2", "evaluate.max_examples=2", "sweep.trials=2"]
    for block, line in commands(blocks(SWEEPS, "sh")):
        _, job, *words = shlex.split(line, comments=True)
        done = jobs.call(Path(job).stem, *words, *short, "evaluate.max_new_tokens=2", cwd=here)
        assert done.returncode == 0, f"{block}: {line}\n{done.stdout}{done.stderr}"
    assert (here / "runs" / "digits_sweep_best" / "eval.jsonl").is_file()


@pytest.mark.slow
def test_the_library_does_what_its_page_shows(here: Path) -> None:
    (snippet,) = blocks("docs/library.md", "python")
    done = run("-c", snippet.text, cwd=here)
    assert done.returncode == 0, done.stderr
    assert "step 6/6" in done.stdout and (here / "exported" / "model.safetensors").is_file()


def test_every_command_of_a_page_is_run_by_a_test_here() -> None:
    covered = {*SAME_RUN, "docs/strategies.md", TUTORIAL, SWEEPS, *documents.EXAMPLES}
    for page in documents.pages():
        assert page in covered or not blocks(page, "sh"), f"no test runs the commands of {page}"
