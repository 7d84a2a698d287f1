"""Where Ctrl-C leaves a run is said as it is, and what the same command does then."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from raysft.config import Config
from raysft.driver import preflight, preview
from raysft.driver.launch import Start
from raysft.train.loop import train
from tests.cluster.conftest import ROOT, default_interrupt
from tests.support.models import AUDIO
from tests.support.worlds import start, tiny
from tests.unit.train.test_checkpoint import ONE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.slow
def test_who_only_drives_or_controls_a_run_loads_no_models() -> None:
    """Ray's controller unpickles what `launch` hands it: seconds at every start, where it does."""
    code = "import sys, raysft.driver.launch; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_an_interrupted_run_says_what_the_same_command_does(tmp_path: Path) -> None:
    config = tiny(tmp_path, train__max_steps=3)
    job = start(config, ONE)
    begun = Start(job.folder)
    assert begun.left(config) == (
        "interrupted before the first checkpoint; the same command begins at step 1"
    )
    train(job)
    assert begun.left(config) == "interrupted; the same command continues from step 3"
    begun.total_steps = 5
    assert begun.left(config) == "interrupted; the same command continues from step 3 of 5"


def test_an_interruption_after_the_last_step_does_not_promise_to_continue(tmp_path: Path) -> None:
    source = [{"path": str(tmp_path / "units.json"), "name": "dev"}]
    config = tiny(tmp_path, train__max_steps=3, data__eval=source, evaluate__max_new_tokens=1)
    job = start(config, ONE)
    evaluate, job.evaluate = job.evaluate, None  # interrupted before it
    train(job)
    begun = Start(job.folder, total_steps=3)
    assert begun.left(config) == (
        "interrupted; the last step, 3, is trained and saved; the same command makes the "
        "evaluation that is left"
    )
    assert evaluate is not None
    train(start(config, ONE))
    assert begun.left(config) == (
        "interrupted; the run is finished all the same: its last step, 3, is saved"
    )


JOB = """
import sys, time
from raysft.cli import guarded
def main(argv):
    print("ready", flush=True)
    time.sleep(60)
    raise KeyboardInterrupt
guarded(main)
"""


def test_an_interrupted_job_that_is_no_run_says_nothing_of_one() -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", JOB],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_interrupt,
    )
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 130
    assert errors.split("\n") == ["", "interrupted", ""]


def test_the_summary_counts_clips_hours_and_what_is_unused_by_reason(
    make_clips: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = make_clips(20)
    seconds = sum(soundfile.info(path).duration for path in sorted(corpus.parent.glob("*.wav"))[3:])
    for number in (0, 1):
        (corpus.parent / f"clip{number:04d}.wav").unlink()
    (corpus.parent / "clip0002.wav").write_bytes(b"")
    tree = {
        "run": {"name": "run", "storage_path": str(tmp_path)},
        "data": {
            "train": [{"path": str(corpus)}],
            "lanes": 2,
            "tokens_per_batch": 400,
            "max_quarantined": 0.5,
        },
        "model": AUDIO,
        "train": {"max_steps": 7},
    }
    config = Config.model_validate(tree)
    (tmp_path / "run").mkdir()
    doing: list[str] = []
    prepared = preflight.prepare(config, tmp_path / "run", say=doing.append)
    assert preview.summary(prepared, tmp_path / "run") == [
        f"train   17 examples, {seconds:.0f} seconds of audio",
        "unused  3 examples: 2 missing, 1 empty",
        "steps   7, of 2 micro-batches of up to 400 tokens",
        f"run     {tmp_path / 'run'}",
        f"curves  tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}",
    ]
    stages = ["loading the tokenizer", "indexing data.train: 1 source", "planning batches"]
    assert [text for text in doing if text in stages] == stages


def test_workers_that_evaluate_beside_training_count_and_share_no_model_of_its_workers(
    tmp_path: Path,
) -> None:
    from raysft.driver.beside import alone, evaluating
    from raysft.driver.sweep import Need

    settings = tiny(
        tmp_path,
        parallel__workers=4,
        parallel__strategy="fsdp",
        parallel__replicate=2,
        evaluate__every=5,
        evaluate__beside=True,
        evaluate__workers=3,
    )
    assert settings.evaluate.apart == 3
    assert Need.of(settings).workers == 7  # what a trial of a sweep takes
    second = evaluating(settings)
    assert (second.parallel.workers, second.parallel.replicate) == (3, "auto")
    assert second.evaluate.apart == alone(settings).evaluate.apart == 0
    assert second.evaluate.every == 5
    never = settings.evaluate.model_copy(update={"every": 0})
    assert never.apart == 0
