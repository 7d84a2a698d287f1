"""What an encoder computes of a clip: as it is planned, and as it comes to the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from raysft.config import Config
from raysft.config.families import named
from raysft.config.schema import Data, Model
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import Audio, Example, MicroBatch
from raysft.data.index.table import Index
from raysft.data.plan.plan import Plan
from raysft.driver.preview import dry_run
from raysft.errors import UserError
from raysft.families.audio_lm.types import TYPES
from raysft.models import build
from raysft.models.one_length import alike
from raysft.parallel import World
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support import audio_zoo as zoo
from tests.support.worlds import resolved, start

HOP_S = 0.01
ALIKE = sorted(kind for kind, row in TYPES.items() if row.alike and kind in zoo.TINY)


def encoder_of(folder: Path, **data: object) -> Encoder:
    return make_encoder(Model(path=str(folder), family="audio_lm"), Data(**data), folder)


@pytest.mark.parametrize("kind", sorted(kind for kind in zoo.TINY if TYPES[kind].layout == "rows"))
def test_rows_are_planned_whole(kind: str, tmp_path: Path) -> None:
    encoder = encoder_of(zoo.save(kind, tmp_path / kind))
    for samples in (4000, 15999, 16000, 16001, 40000):
        found = encoder.part_encoded(Audio("x"), zoo.clip(samples), None).arrays["features"]
        rows, _, frames = found.shape
        assert encoder.computed(samples) == pytest.approx(rows * frames * HOP_S)


@pytest.mark.parametrize(
    "kind", sorted(kind for kind in zoo.TINY if TYPES[kind].layout == "frames")
)
def test_of_frames_a_clip_is_planned_with_what_it_has(kind: str, tmp_path: Path) -> None:
    encoder = encoder_of(zoo.save(kind, tmp_path / kind))
    assert encoder.computed(16000) == 16000 / encoder.sample_rate
    example = Example("a", "asr", (Audio("x"), "and", Audio("y")), ("one",))
    assert encoder.workload(example, [16000, 8000]) == 24000 / encoder.sample_rate


def test_of_several_forms_the_dearest_counts(tmp_path: Path) -> None:
    encoder = encoder_of(zoo.save("qwen3_asr", tmp_path))
    other = Example("b", "asr", (Audio("x"), Audio("y")), ("two",))
    example = Example("a", "asr", (Audio("x"),), ("one",), variants=(other,))
    assert encoder.workload(example, [16000, 8000]) == 24000 / encoder.sample_rate


def test_clips_of_a_group_are_no_shorter_than_half_the_longest() -> None:
    draws = np.random.default_rng(0)
    for _ in range(50):
        lengths = draws.integers(1, 3000, draws.integers(1, 40)).tolist()
        groups = alike(lengths)
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
        for group in groups:
            found = [lengths[row] for row in group]
            assert 2 * min(found) >= max(found)
        assert len(groups) <= 1 + np.log2(max(lengths) / min(lengths))


@pytest.mark.parametrize("kind", ALIKE)
@torch.no_grad()
def test_one_long_clip_does_not_lengthen_the_others(kind: str, tmp_path: Path) -> None:
    folder = zoo.save(kind, tmp_path / kind)
    encoder = encoder_of(folder, mode="packed")
    ours = build(Model(path=str(folder), family="audio_lm"), Data(), encoder, 0)
    ours.model.eval()
    computed: list[int] = []

    def count(part: object, args: tuple[torch.Tensor, ...], given: dict[str, torch.Tensor]) -> None:
        mask = given["input_features_mask"] if len(args) < 2 else args[1]
        computed.append(mask.numel())

    tower = ours.net.model.audio_tower
    tower.register_forward_pre_hook(count, with_kwargs=True)
    lengths = [64000, *[8000] * 20]
    items = []
    for number, samples in enumerate(lengths):
        example = Example(str(number), "asr", (Audio("x"),), ("one",))
        items.append(encoder.encode(example, [zoo.clip(samples, number)]))
    batch = MicroBatch.join(0, 1, 0, items)
    heard = int(batch.arrays["features"].lengths.sum())
    spare = TYPES[kind].multiple * len(lengths)
    ours.loss(ours.collate(batch))
    assert sum(computed) < 2 * heard + spare
    assert len(computed) == 2
    longest = int(batch.arrays["features"].lengths.max())
    assert len(lengths) * longest > 3 * (2 * heard + spare) / 2  # what it was for


# -- runs ----------------------------------------------------------------------------------------


def config(folder: Path, name: str, **data: Any) -> Config:
    """Of 24 clips of half a second for a model that pads each to a second."""
    manifest = folder / "train.jsonl"
    if not manifest.exists():
        zoo.save("glmasr", folder / "base")
        lines = []
        for number in range(24):
            soundfile.write(folder / f"{number}.wav", zoo.clip(8000, number), 16000)
            line = {"task_type": "asr", "wav_path": f"{number}.wav", "text": f"text {number}"}
            lines.append(line | {"id": f"c{number}"})
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree: dict[str, Any] = {
        "run": {"name": name, "storage_path": str(folder / "runs")},
        "data": {"train": [{"path": str(manifest)}], "lanes": 2, "tokens_per_batch": 1000, **data},
        "model": {"path": str(folder / "base"), "family": "audio_lm"},
        "optim": {"lr": 1e-3},
        "train": {"epochs": 1},
        "log": {"tensorboard": False, "every": 1},
    }
    return Config.model_validate(tree)


def test_a_run_keeps_to_what_its_encoder_may_compute(tmp_path: Path) -> None:
    second = encoder_of(zoo.save("glmasr", tmp_path / "base")).computed(8000)
    free = resolved(config(tmp_path, "free"))
    said = dry_run(free)
    computed = f"{24 * second:,.0f} seconds"
    assert f"12 seconds; with what clips are padded to, the encoder computes {computed}" in said
    assert "1 an epoch" in said
    limited = config(tmp_path, "limited", audio_per_batch=4 * second)
    train(start(limited, World.current()))
    lines = [
        line
        for path in (tmp_path / "runs" / "limited" / "ledger").glob("*.jsonl")
        for line in read_lines(path)
    ]
    assert sorted(name for line in lines for name in line["ids"]) == sorted(
        f"c{number}" for number in range(24)
    )
    assert {len(line["ids"]) for line in lines} == {4}
    with pytest.raises(UserError, match=r"data\.audio_per_batch"):
        start(config(tmp_path, "limited", audio_per_batch=8 * second), World.current())


def test_clips_beyond_the_limit_are_named(tmp_path: Path) -> None:
    few = config(tmp_path, "few", audio_per_batch=0.2)
    with pytest.raises(UserError, match=r"(?s)audio_per_batch=0.2"):
        start(few, World.current())


def test_an_index_of_before_is_refused_where_the_limit_needs_more(tmp_path: Path) -> None:
    limited = config(tmp_path, "limited", audio_per_batch=4)
    start(limited, World.current())
    folder = next(path.parent for path in (tmp_path / "runs").rglob("heard.npy"))
    meta = json.loads((folder / "meta.json").read_text())
    del meta["heard"]
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "heard.npy").unlink()
    old = Index.load(folder)
    assert len(old) == 24
    with pytest.raises(UserError, match=r"data.audio_per_batch: .*start the job again to rebuild"):
        Plan.of(old, limited.data, 0)


@pytest.mark.parametrize("family", ["causal_lm", "seq2seq"])
def test_families_whose_tokens_have_it_all_refuse_the_key(family: str) -> None:
    assert "leave it out" in named(family).refused_keys["data.audio_per_batch"]
