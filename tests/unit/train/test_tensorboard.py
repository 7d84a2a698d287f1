"""What TensorBoard is given: groups, and never one name for training and evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support.worlds import start, tiny
from tests.unit.train.test_checkpoint import ONE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_training_evaluation_speed_and_data_are_groups_of_their_own(tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        train__max_steps=4,
        log__tensorboard=True,
        data__eval=[{"path": str(tmp_path / "units.json"), "name": "dev"}],
        evaluate__every=2,
        evaluate__max_new_tokens=2,
        evaluate__max_examples=4,
    )
    run = start(config, ONE)
    train(run)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {tag.split("/")[0] for tag in tags} == {"train", "eval", "speed", "data", "run"}
    wanted = {"train/loss", "train/lr", "train/grad_norm", "speed/tokens_per_s", "speed/data_wait"}
    assert tags >= wanted | {"data/padding", "eval/wer/dev", "run/restarts"}
    (task,) = [key for key in read_lines(run.folder / "eval.jsonl")[0] if key.startswith("loss/")]
    assert {f"train/{task}", f"eval/{task}"} <= tags
    for group, name, steps in (("train", "metrics", [1, 2, 3, 4]), ("eval", "eval", [2, 4])):
        shown = [(e.step, pytest.approx(e.value)) for e in events.Scalars(f"{group}/{task}")]
        written = [(x["step"], x[task]) for x in read_lines(run.folder / f"{name}.jsonl")]
        assert written == shown
        assert [step for step, _ in written] == steps
