"""Runs of the model types of seq2seq that read a clip at its own length: under every strategy, and
killed and gone on with.

The clips of a lane are of other lengths, and of another number of lengths, than those of the next:
encoders run another number of times on each worker.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from raysft.config.families import named
from raysft.config.schema import Data, Model
from raysft.data.encode import make_encoder
from raysft.export import export
from raysft.models import build
from raysft.run.lines import read_lines
from tests.properties.test_audio_runs import ADAPTERS, check_adapters, losses
from tests.support import seq2seq as zoo
from tests.support import worlds

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS = 12
FAST = ("moonshine",)  # in make test
KINDS = [
    pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in sorted(zoo.TINY)
]
LENGTHS = (6000, 6000, 9000, 14001, 14001, 20000, 31000)


def corpus(folder: Path) -> Path:
    """Clips, of which some are of one length."""
    path = folder / "clips.jsonl"
    if path.exists():
        return path
    rng, lines = np.random.default_rng(0), []
    for number in range(36):
        clip = 0.1 * rng.standard_normal(LENGTHS[number % len(LENGTHS)])
        soundfile.write(folder / f"{number}.wav", clip.astype(np.float32), 16000)
        line = {"task_type": "asr", "wav_path": f"{number}.wav", "text": f"Number {number}."}
        lines.append(line | {"id": f"c{number}", "lang": ("en", "de")[number % 2]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def base_of(kind: str, folder: Path) -> Path:
    """A checkpoint of `kind`."""
    model, data = Model(**zoo.model(kind, folder)), Data(mode="padded")
    return export(build(model, data, make_encoder(model, data, folder), 1), folder / "base")


def write(folder: Path, base: Path, name: str, strategy: str, **sections: Any) -> Path:
    """The config file of a run."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "data": {
            "train": [str(corpus(folder))],
            "mode": "padded",
            "lanes": 3,
            "window": 24,
            "tokens_per_batch": 250,
        },
        "model": {"path": str(base)},
        "parallel": {"strategy": strategy},
        "optim": {"lr": 1e-2},
        "train": {"max_steps": STEPS},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 4},
    }
    for section, keys in sections.items():
        tree.setdefault(section, {}).update(keys)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("kind", "strategies"),
    [
        pytest.param(kind, ("ddp", "fsdp", "zero3"), marks=pytest.mark.slow)
        for kind in sorted(zoo.TINY)
    ],
)
def test_clips_of_other_lengths_train_alike_under_every_strategy(
    kind: str, strategies: tuple[str, ...], tmp_path: Path
) -> None:
    base = base_of(kind, tmp_path)
    one = write(tmp_path, base, "one", "ddp")
    paths = [write(tmp_path, base, s, s) for s in strategies]
    assert worlds.run(1, one) == 0
    assert worlds.run(2, *paths) == 0
    expected = losses(tmp_path, "one")
    assert len(expected) == STEPS and expected[-1] < expected[0]
    for strategy in strategies:
        assert losses(tmp_path, strategy) == pytest.approx(expected, rel=1e-4), strategy


@pytest.mark.slow
def test_workers_answer_at_their_own_pace_on_weights_that_are_whole(tmp_path: Path) -> None:
    """The encoder runs another number of times on each; in the last round one has no clip."""
    base = base_of(FAST[0], tmp_path)
    data = {"eval": [str(corpus(tmp_path))]}
    asked = {"tokens_per_batch": 120, "max_new_tokens": 6}
    paths = [write(tmp_path, base, s, s, data=data, evaluate=asked) for s in ("ddp", "fsdp")]
    assert worlds.run(2, *paths) == 0
    first, second = (read_lines(tmp_path / "runs" / s / "eval.jsonl")[-1] for s in ("ddp", "fsdp"))
    figures = [key for key in first if "/" in key]
    assert any(key.startswith("wer/") for key in figures)
    for key in figures:
        assert second[key] == pytest.approx(first[key], rel=1e-3), key


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_go_on_to_the_last_bit_after_a_kill_and_load_in_plain_peft(
    kind: str, tmp_path: Path
) -> None:
    base = base_of(kind, tmp_path)
    whole, killed = (
        write(tmp_path, base, name, "ddp", peft=ADAPTERS) for name in ("whole", "killed")
    )
    check_adapters(tmp_path, whole, killed, base, named("seq2seq").net_class(kind))
