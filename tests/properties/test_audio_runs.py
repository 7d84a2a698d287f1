"""Runs of the model types of audio_lm: under every strategy, killed and gone on with, exported.

Conversations without a clip, with one, and with one in every turn, in such batches that some
workers have no clip at all, and that encoders run another number of times on each.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from raysft.config.families import named
from raysft.export import export_run
from raysft.run.lines import read_lines
from tests.properties.test_bit_identity import state
from tests.support import audio_zoo as zoo
from tests.support import worlds

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS = 12
ADAPTERS = {"method": "lora", "r": 4, "dropout": 0.2}
FAST = ("granite_speech",)  # in make test: one whose encoder has no mask
KINDS = [
    pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in sorted(zoo.TINY)
]


def corpus(folder: Path) -> Path:
    """Conversations of one to three turns, with no clip, one, or one in every turn."""
    path = folder / "talk.jsonl"
    if path.exists():
        return path
    lines = []
    for number in range(36):
        turns, clips = [], []
        for turn in range(1 + number % 3):
            heard = number % 4 == 0 or (number % 4 == 1 and turn == 0)
            if heard:
                name = f"{number}_{turn}.wav"
                soundfile.write(folder / name, zoo.clip(3000 + 800 * (number % 9), number), 16000)
                clips.append(name)
            turns.append({"role": "user", "content": f"{'<audio>' * heard}Well {turn}?"})
            turns.append({"role": "assistant", "content": f"Number {number}."})
        lines.append({"id": f"c{number}", "messages": turns, "audios": clips})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write(folder: Path, base: Path, name: str, strategy: str, **sections: Any) -> Path:
    """The config file of a run."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "data": {"train": [str(corpus(folder))], "lanes": 3, "window": 24, "tokens_per_batch": 250},
        "model": {"path": str(base), "family": "audio_lm"},
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


def losses(folder: Path, name: str) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "runs" / name / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("kind", "strategies"),
    [
        *((kind, ("ddp", "fsdp")) for kind in FAST),
        *(
            pytest.param(kind, ("ddp", "fsdp", "zero3"), marks=pytest.mark.slow)
            for kind in sorted(zoo.TINY)
        ),
    ],
)
def test_batches_with_and_without_clips_train_alike_under_every_strategy(
    kind: str, strategies: tuple[str, ...], tmp_path: Path
) -> None:
    base = zoo.save(kind, tmp_path / "base")
    mode = {"mode": zoo.MODES.get(kind, "packed")}
    paths = [write(tmp_path, base, s, s, data=mode) for s in strategies]
    assert worlds.run(2, *paths) == 0
    found = {strategy: losses(tmp_path, strategy) for strategy in strategies}
    assert len(found["ddp"]) == STEPS
    assert found["ddp"][-1] < found["ddp"][0]
    for strategy in strategies:
        assert found[strategy] == pytest.approx(found["ddp"], rel=1e-4), strategy


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAST)
def test_workers_answer_at_their_own_pace_on_weights_that_are_whole(
    kind: str, tmp_path: Path
) -> None:
    """The encoder runs another number of times on each, and on some not at all."""
    base = zoo.save(kind, tmp_path / "base")
    data = {"mode": zoo.MODES.get(kind, "packed"), "eval": [str(corpus(tmp_path))]}
    asked = {"tokens_per_batch": 200, "max_new_tokens": 6, "metrics": {"chat": ["chrf"]}}
    paths = [write(tmp_path, base, s, s, data=data, evaluate=asked) for s in ("ddp", "fsdp")]
    assert worlds.run(2, *paths) == 0
    first, second = (read_lines(tmp_path / "runs" / s / "eval.jsonl")[-1] for s in ("ddp", "fsdp"))
    figures = [key for key in first if "/" in key]
    assert any(key.startswith("chrf/") for key in figures)
    for key in figures:
        assert second[key] == pytest.approx(first[key], rel=1e-3), key


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_go_on_to_the_last_bit_after_a_kill_and_load_in_plain_peft(
    kind: str, tmp_path: Path
) -> None:
    base = zoo.save(kind, tmp_path / "base")
    peft = ADAPTERS
    mode = {"mode": zoo.MODES.get(kind, "packed")}
    whole, killed = (
        write(tmp_path, base, name, "ddp", peft=peft, data=mode) for name in ("whole", "killed")
    )
    check_adapters(tmp_path, whole, killed, base, named("audio_lm").net_class(kind))
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


def check_adapters(folder: Path, whole: Path, killed: Path, base: Path, net_class: type) -> None:
    """Two runs of one config, "whole" and "killed" in `folder`: one is killed at step 6 and goes
    on. Both come to the same, and what is exported of them is what peft and transformers load."""
    assert worlds.run(1, whole, killed, kill_at=6) == -signal.SIGKILL
    assert worlds.run(1, killed) == 0
    runs = folder / "runs"
    assert losses(folder, "whole") == losses(folder, "killed")
    left, right = state(runs / "whole"), state(runs / "killed")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    export_run(runs / "whole", folder / "adapter")
    export_run(runs / "whole", folder / "merged", merge=True)
    adapted = PeftModel.from_pretrained(net_class.from_pretrained(base), folder / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    plain = net_class.from_pretrained(folder / "merged").state_dict()
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-5)
    assert any(
        not torch.equal(tensor, plain[name])
        for name, tensor in net_class.from_pretrained(base).state_dict().items()
    )
