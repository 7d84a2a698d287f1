"""What an encoder computes of a clip: as it is planned, and as it comes to the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raysft.config.schema import Data, Model
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import Audio, Example, MicroBatch
from raysft.families.audio_lm.one_length import alike
from raysft.families.audio_lm.types import TYPES
from raysft.models import build
from tests.support import audio_zoo as zoo

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
