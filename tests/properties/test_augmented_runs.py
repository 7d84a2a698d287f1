"""Runs whose clips are varied, in real processes: neither workers nor kills change what is drawn.

Every kind is on: clips longer than they are among them, recordings, voices of the training data.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from raysft.audit import audit
from raysft.run.lines import read_lines
from tests.support import worlds
from tests.support.models import AUDIO

STEPS = 9


@pytest.fixture(scope="module")
def corpus(make_clips: Callable[..., Path]) -> Path:
    """41 clips, and noise and a room beside them."""
    corpus = make_clips(41)
    rng = np.random.default_rng(0)
    for name, samples in (("noise", 80000), ("noise", 9000), ("room", 3000)):
        (corpus.parent / name).mkdir(exist_ok=True)
        fading = np.exp(-np.arange(samples) / 500) if name == "room" else 0.1
        wave = rng.standard_normal(samples) * fading
        soundfile.write(corpus.parent / name / f"{samples}.flac", 0.2 * wave, 16000)
    return corpus


def write_config(folder: Path, corpus: Path, name: str, **data: Any) -> Path:
    augment = {
        "speed": {"p": 0.6, "factors": [0.85, 0.95, 1.1]},
        "reverb": {"p": 0.3, "path": str(corpus.parent / "room")},
        "babble": {"p": 0.3},
        "noise": {"p": 0.5, "path": str(corpus.parent / "noise")},
        "band": {"p": 0.3},
        "codec": {"p": 0.3, "kinds": ["mulaw", "gsm", "vorbis"]},
        "volume": {"p": 0.5},
        "spec": {"p": 0.7},
    }
    tree = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "data": {
            **{"train": [str(corpus)], "lanes": 4, "window": 40},
            **{"tokens_per_batch": 400, "augment": augment, **data},
        },
        "model": AUDIO,
        "optim": {"lr": 1e-3, "warmup": 3},
        "train": {"max_steps": STEPS},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 4},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def ledger(run: Path) -> dict[tuple[int, int], tuple[list[str], str]]:
    """(step, lane) -> ids, and the digest of ids, labels and features."""
    found = {}
    for file in sorted((run / "ledger").glob("*.jsonl")):
        for line in read_lines(file):
            key = (line["step"], line["lane"])
            assert key not in found, f"{key} is in the ledger twice"
            found[key] = (line["ids"], line["tensors"])
    assert len(found) == 4 * STEPS
    return found


def losses(run: Path) -> list[tuple[float, float]]:
    lines = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one worker, never disturbed; beside it one of which no clip is varied, and one
    that was killed at its sixth step."""
    folder = tmp_path_factory.mktemp("reference")
    plain = write_config(folder, corpus, "plain", augment=None)
    configs = [write_config(folder, corpus, name) for name in ("one", "killed")]
    assert worlds.run(1, plain, *configs, kill_at=6) == -signal.SIGKILL
    return folder / "runs" / "one"


def test_clips_are_varied_and_none_is_lost(reference: Path) -> None:
    assert read_lines(reference / "quarantine.jsonl") == []
    varied, plain = (
        {tensors for _, tensors in ledger(run).values() if tensors}
        for run in (reference, reference.with_name("plain"))
    )
    assert varied and plain and varied.isdisjoint(plain)


@pytest.mark.slow  # test_reread does it with clips as they are
def test_all_can_be_read_again(reference: Path) -> None:
    report = audit(reference, sample=1000)
    assert report.clean
    assert report.reread == sum(bool(ids) for ids, _ in ledger(reference).values())


@pytest.mark.parametrize("size", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_ledgers_and_losses_are_the_same_for_every_world_size(
    size: int, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, corpus, f"of_{size}")
    assert worlds.run(size, config) == 0
    run = tmp_path / "runs" / config.stem
    assert ledger(run) == ledger(reference)
    np.testing.assert_allclose(losses(run), losses(reference), rtol=1e-5)


def test_killed_and_started_again_is_the_same_to_the_last_bit(reference: Path) -> None:
    run = reference.with_name("killed")
    assert len(read_lines(run / "metrics.jsonl")) == 6
    assert worlds.run(1, reference.parents[1] / "killed.yaml") == 0
    assert ledger(run) == ledger(reference)
    assert losses(run) == losses(reference)
