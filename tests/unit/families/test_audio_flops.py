"""FLOPs of audio encoders against torch's own counter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raysft.config import schema
from raysft.data.encode import make_encoder
from raysft.data.example import MicroBatch, Sequence
from raysft.families.audio_lm.processor_model import ProcessorLM
from raysft.families.audio_lm.types import TYPES
from raysft.models import build
from raysft.train import flops
from raysft.train.feed import turn_of
from tests.support import audio_zoo as zoo
from tests.support.model_zoo import loss_of

SAMPLES = (15000, 31000, 64000)
FAST = ("qwen3_asr", "glmasr")  # in make test
PARTS = tuple(
    f"model.{part}" for part in ("audio_tower", "multi_modal_projector", "encoder", "projector")
)
KNOWN = [kind for kind in sorted(zoo.TINY) if TYPES[kind].cost is not None]


def model_of(kind: str, folder: Path) -> ProcessorLM:
    """Its tiny model, with attention and experts that torch counts."""
    model = schema.Model(path=str(zoo.save(kind, folder / "base")), family="audio_lm")
    data = schema.Data(mode="padded")
    found = build(model, data, make_encoder(model, data, "unused"), 0)
    assert isinstance(found, ProcessorLM)
    found.freeze_unreached()
    found.net.set_attn_implementation("eager")
    if hasattr(found.net, "set_experts_implementation"):
        found.net.set_experts_implementation("eager")
    return found


def clip_of(model: ProcessorLM, samples: int) -> MicroBatch:
    """A clip, and one token that is learnt."""
    silent = model.silent_document(samples)
    labels = silent.labels.copy()
    labels[-1] = silent.input_ids[-1]
    sequence = Sequence("clip", "asr", silent.input_ids, labels, silent.arrays, samples / 16000)
    return MicroBatch.join(0, 1, 0, [sequence])


def seen(model: ProcessorLM, batch: MicroBatch) -> tuple[float, float]:
    """What torch counts forward and backward: in all, and of what hears."""
    laid_out = model.collate(batch)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, laid_out).sum.backward()
    counts = counter.get_flop_counts()
    if any(isinstance(m, torch.nn.Conv1d) and m.groups > 1 for m in model.net.modules()):
        # Backward, torch counts a convolution of groups as one that has none.
        forward, backward = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
        for found in counts.values():
            if backward in found:
                found[backward] = 2 * found.get(forward, 0)
    heard = sum(sum(found.values()) for name, found in counts.items() if name.endswith(PARTS))
    return float(sum(counts["Global"].values())), float(heard)


def said(model: ProcessorLM, batch: MicroBatch) -> tuple[float, float]:
    """The same by the formula."""
    cost = flops.cost_of(model.model, model.unreached)
    assert cost is not None
    counts = turn_of(model, batch).counts
    # Without a kernel, torch computes and counts what a causal mask hides.
    counts["squares"] *= 2
    heard = {name: counts[name] for name in ("frames", "attended")}
    return cost.total(counts), cost.total(heard)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in FAST else pytest.mark.slow) for k in KNOWN]
)
def test_an_encoder_costs_what_torch_counts(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path)
    assert flops.formula_holds(model.net)
    longest = model.encoder.most or SAMPLES[-1]
    share = min(1.0, longest / SAMPLES[-1])
    batches = [clip_of(model, int(share * samples)) for samples in SAMPLES]
    for batch in batches:
        assert said(model, batch) == pytest.approx(seen(model, batch), rel=0.15)
    hears = [name for name, _ in model.net.named_parameters() if any(p in name for p in PARTS)]
    model.freeze(hears)
    batch = batches[-1]
    assert said(model, batch)[1] == pytest.approx(seen(model, batch)[1], rel=0.15)


def test_frames_are_counted_in_a_batch_without_clips_too(tmp_path: Path) -> None:
    model = model_of("qwen3_asr", tmp_path)
    two = [clip_of(model, samples) for samples in SAMPLES[:2]]
    none = model.counts(MicroBatch.join(0, 0, 0, []))
    assert none["frames"] == none["attended"] == 0
    found = [model.counts(batch) for batch in two]
    assert all(one.keys() == none.keys() for one in found)
    assert np.array_equal([one["frames"] for one in found], [93, 193])
    # Windows of 100 frames, 13 positions: 2 layers of width 32.
    assert found[1]["attended"] == 2 * 32 * (13**2 + 12**2)


@pytest.mark.parametrize("kind", sorted(zoo.TINY))
def test_every_type_has_a_cost_or_is_said_to_have_none(kind: str) -> None:
    told = (Path(__file__).parents[3] / "docs" / "audio.md").read_text(encoding="utf-8")
    (line,) = [line for line in told.splitlines() if line.startswith("No figure of FLOPs")]
    assert (TYPES[kind].cost is None) == (f"`{kind}`" in line)
