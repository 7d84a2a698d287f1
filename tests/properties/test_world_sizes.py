"""The core promise, in real processes: neither workers nor kills change what is trained.

No Ray here (tests/cluster has the same with it): gloo groups of 1 to 4 processes.
"""

from __future__ import annotations

import json
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

STEPS = 20


@pytest.fixture(scope="module")
def corpus(make_clips: Callable[..., Path]) -> Path:
    """67 clips: with 4 lanes the last step of an epoch is not full."""
    return make_clips(67)


def write_config(folder: Path, corpus: Path, name: str, **changes: Any) -> Path:
    tree = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "data": {"train": [str(corpus)], "lanes": 4, "tokens_per_batch": 500, "window": 40},
        "model": AUDIO,
        "parallel": {"strategy": "ddp"},
        "optim": {"lr": 1e-3, "weight_decay": 0.01, "schedule": "cosine", "warmup": 5},
        "train": {"max_steps": STEPS},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 7},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    path = folder / f"{tree['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def ledger(run: Path) -> dict[tuple[int, int], list[str]]:
    """(step, lane) -> ids; fails on a line that is there twice."""
    found: dict[tuple[int, int], list[str]] = {}
    for file in sorted((run / "ledger").glob("*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            key = (line["step"], line["lane"])
            assert key not in found, f"{key} is in the ledger twice"
            found[key] = line["ids"]
    return found


def losses(run: Path) -> list[float]:
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one worker, never disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    assert worlds.run(1, write_config(folder, corpus, "one")) == 0
    return folder / "runs" / "one"


@pytest.mark.parametrize(
    "size", [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 4))]
)
def test_ledger_and_losses_are_the_same_for_every_world_size_and_strategy(
    size: int, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    """Lanes that an epoch's last step cannot fill, and workers without a lane, run a turn of weight
    zero through every module: ranks of different step counts (ray 66085) or a rank that leaves out
    the audio encoder (swift 7356) would hang the others."""
    configs = [
        write_config(tmp_path, corpus, f"{strategy}_{size}", parallel__strategy=strategy)
        for strategy in ("ddp", "fsdp")
    ]
    configs.append(write_config(tmp_path, corpus, f"filled_{size}", train__static_shapes=True))
    assert worlds.run(size, *configs) == 0
    for config in configs:
        run = tmp_path / "runs" / config.stem
        assert ledger(run) == ledger(reference)
        assert losses(run) == pytest.approx(losses(reference), rel=1e-5)


@pytest.mark.slow  # test_bit_identity does it with three workers
@pytest.mark.parametrize(("size", "kills"), [(1, (2, 13)), (2, (9,))])
def test_killed_and_started_again_is_the_same_to_the_last_bit(
    size: int, kills: tuple[int, ...], corpus: Path, reference: Path, tmp_path: Path
) -> None:
    undisturbed = write_config(tmp_path, corpus, "undisturbed")
    killed = write_config(tmp_path, corpus, "killed")
    assert worlds.run(size, undisturbed) == 0
    for step in kills:
        assert worlds.run(size, killed, kill_at=step) == -signal.SIGKILL
    assert worlds.run(size, killed) == 0
    assert ledger(tmp_path / "runs" / "killed") == ledger(reference)
    assert losses(tmp_path / "runs" / "killed") == losses(tmp_path / "runs" / "undisturbed")


def test_the_same_clips_are_quarantined_after_kills_and_at_any_world_size(
    make_clips: Callable[..., Path], tmp_path: Path
) -> None:
    """Found while training: their headers are as they should be."""
    corpus = make_clips(67)
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    paths = [corpus.parent / record["wav_path"] for record in records]
    for number, spoil in ((5, np.nan), (23, np.inf), (41, 0.0)):
        samples, rate = soundfile.read(paths[number])
        soundfile.write(paths[number], np.full_like(samples, spoil), rate, "FLOAT", format="WAV")
    listed = []
    for name, size, kills in (("three", 3, ()), ("killed", 1, (12,))):
        config = write_config(tmp_path, corpus, name, data__max_quarantined=0.1)
        for step in kills:
            assert worlds.run(size, config, kill_at=step) == -signal.SIGKILL
        assert worlds.run(size, config) == 0
        run = tmp_path / "runs" / name
        assert audit(run).clean
        listed.append(read_lines(run / "quarantine.jsonl"))
    assert listed[0] == listed[1]
    found = {Path(line["path"]): line["reason"].split(": ")[1] for line in listed[0]}
    assert set(found) == {paths[number] for number in (5, 23, 41)}
    assert "NaN or infinite" in found[paths[5]] and "silent" in found[paths[41]]


@pytest.mark.slow  # test_loss does it with one worker
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_weights_of_tasks_mean_the_same_for_every_world_size(
    strategy: str, make_clips: Callable[..., Path], tmp_path: Path
) -> None:
    corpus, runs = make_clips(20), {}
    sources = [str(corpus), {"path": str(make_clips(20, seed=1)), "task": "qa"}]
    for name, size, weights in (("one", 1, {"qa": 0.3}), ("two", 2, {"qa": 0.3}), ("flat", 1, {})):
        kind = "ddp" if size == 1 else strategy
        config = write_config(
            tmp_path,
            corpus,
            name,
            parallel__strategy=kind,
            train__task_weights=weights,
            train__max_steps=6,
            data__train=sources,
            data__prompts={"asr": "a", "qa": "q"},
        )
        assert worlds.run(size, config) == 0
        runs[name] = read_lines(tmp_path / "runs" / name / "metrics.jsonl")
    for one, two in zip(runs["one"], runs["two"], strict=True):
        for key in ("loss", "loss/asr", "loss/qa", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), key
    weighted, flat = runs["one"][0], runs["flat"][0]
    for key in ("loss/asr", "loss/qa"):  # unweighted, of the same weights
        assert weighted[key] == flat[key]
    # of the same tokens: loss = share x asr + (1 - share) x weight x qa; the share is a quotient
    # of small differences
    share = (flat["loss"] - flat["loss/qa"]) / (flat["loss/asr"] - flat["loss/qa"])
    expected = share * flat["loss/asr"] + (1 - share) * 0.3 * flat["loss/qa"]
    assert weighted["loss"] == pytest.approx(expected, rel=1e-3)
