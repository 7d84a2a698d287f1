"""Packed rows of one shape: filled up, and worth what they are without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysft.config import Config
from raysft.config.losses import load
from raysft.data.example import MicroBatch
from raysft.models import SpeechModel
from raysft.models.layout import ENDS, SUPERVISED, Static
from raysft.models.router_losses import Weights
from raysft.parallel import World
from raysft.run.lines import read_lines
from raysft.train.feed import one_shape, turn_of
from raysft.train.loop import train
from tests.support import worlds
from tests.support.model_zoo import CONFIGS, batch_of, gradients, loss_of, make, sequences, worst

LENGTHS = [9, 4, 17, 9, 12]
BUDGET = 300
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def both(adapter: SpeechModel, lengths: list[int] = LENGTHS) -> list[Any]:
    """Loss and gradients of a micro-batch as it is, and filled up; in training."""
    adapter.model.train()
    found = []
    for static in (None, Static(BUDGET)):
        if adapter.routing is not None:
            adapter.routing.seen = type(adapter.routing.seen).zeros(
                len(adapter.routing.names), len(adapter.routing.kinds), adapter.routing.experts
            )
        batch = adapter.collate(batch_of(*sequences(adapter, lengths)), static=static)
        loss = loss_of(adapter, batch)
        loss.sum.backward()
        seen = adapter.routing.seen if adapter.routing is not None else None
        found.append((loss, gradients(adapter), seen))
    return found


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_the_row_as_it_is(name: str, rows: int | None) -> None:
    """By task too; whatever goes through the head at a time."""
    adapter = make(name)
    adapter.supervised.rows = rows
    adapter.task_weights["tts"] = 0.5
    adapter.more_losses.append(("z_loss", load("z_loss"), 0.1))
    adapter.wrap(adapter.model)
    (plain, wanted, _), (filled, found, _) = both(adapter)
    assert filled.sum.item() == pytest.approx(plain.sum.item(), rel=1e-6)
    assert [t.name for t in filled.terms] == [t.name for t in plain.terms]
    for ours, theirs in zip(filled.terms, plain.terms, strict=True):
        assert ours.sum.item() == pytest.approx(theirs.sum.item(), rel=1e-6)
        assert ours.count.item() == theirs.count.item()
        assert ours.by_task.keys() == theirs.by_task.keys()
        for task, (total, count) in ours.by_task.items():
            assert total.item() == pytest.approx(theirs.by_task[task][0].item(), rel=1e-6)
            assert count.item() == theirs.by_task[task][1].item()
    assert worst(found, wanted) < 2e-6


@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_what_fills_a_row_is_no_token_of_any_expert(over: Any) -> None:
    """Neither in what routers are seen to do nor in their losses."""
    adapter = make("qwen3_moe")
    adapter.route(None, Weights(balance=0.3, z=0.1, over=over))
    (plain, wanted, before), (filled, found, after) = both(adapter)
    assert before.tokens.sum() > 0
    for ours, theirs in ((after.chosen, before.chosen), (after.tokens, before.tokens)):
        assert torch.equal(ours, theirs)
    assert torch.allclose(after.entropy, before.entropy, rtol=1e-6)
    names = [term.name for term in filled.terms]
    assert "balance" in names and "z" in names
    for ours, theirs in zip(filled.terms, plain.terms, strict=True):
        assert ours.sum.item() == pytest.approx(theirs.sum.item(), rel=1e-5)
        assert ours.count.item() == theirs.count.item()
    assert worst(found, wanted) < 1e-5


def test_nor_in_the_balance_loss_of_transformers() -> None:
    adapter = make("qwen3_moe", output_router_logits=True, router_aux_loss_coef=5.0)
    (plain, wanted, _), (filled, found, _) = both(adapter)
    assert [t.name for t in filled.terms] == ["cross_entropy", "balance"]
    for ours, theirs in zip(filled.terms, plain.terms, strict=True):
        assert ours.sum.item() == pytest.approx(theirs.sum.item(), rel=1e-5)
    assert worst(found, wanted) < 1e-5


def test_shapes_are_the_same_whatever_a_row_holds() -> None:
    adapter, static = make("llama"), Static(BUDGET)
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(30):
        lengths = rng.integers(2, 20, rng.integers(1, 25)).tolist()
        batch = adapter.collate(batch_of(*sequences(adapter, lengths)), static=static)
        shapes.add(tuple((name, tuple(value.shape)) for name, value in sorted(batch.items())))
        assert int(batch["documents"][-1]) == batch["input_ids"].shape[1] == 320
        filling = batch["documents"].diff()[len(lengths) :]
        assert filling.max() <= 128  # attention costs the square
        assert int(batch["real"].sum()) == sum(lengths)
    assert len(shapes) == 1
    assert dict(*shapes)["documents"] == (ENDS,)
    assert dict(*shapes)["keep"] == (SUPERVISED,)


def test_more_documents_than_ever_are_more_ends_from_there_on() -> None:
    adapter, static = make("llama"), Static(BUDGET)

    def ends(count: int) -> int:
        return len(
            adapter.collate(batch_of(*sequences(adapter, [2] * count)), static=static)["documents"]
        )

    assert [ends(count) for count in (3, 70, 3, 80)] == [32, 96, 96, 96]


def test_a_row_that_is_longer_than_it_should_be_is_worth_the_same() -> None:
    adapter, static = make("llama"), Static(64)
    items = batch_of(*sequences(adapter, [40, 30]))
    batch = adapter.collate(items, static=static)
    assert batch["input_ids"].shape == (1, 256)
    found = loss_of(adapter, batch).sum.item()
    assert found == pytest.approx(loss_of(adapter, adapter.collate(items)).sum.item(), rel=1e-6)


def test_a_turn_without_examples_is_a_row_as_well_and_worth_nothing() -> None:
    adapter = make("llama")
    turn = turn_of(adapter, MicroBatch.join(0, 1, 0, []), Static(BUDGET))
    assert turn.batch["input_ids"].shape == (1, 320)
    assert turn.counts["tokens"] == turn.counts["positions"] == 0
    loss = loss_of(adapter, turn.batch)
    loss.sum.backward()
    assert loss.sum.item() == 0 and all(not g.any() for g in gradients(adapter).values())


def test_what_fills_a_row_counts_as_padding() -> None:
    adapter = make("llama")
    counts = turn_of(adapter, batch_of(*sequences(adapter, LENGTHS)), Static(BUDGET)).counts
    assert (counts["tokens"], counts["positions"]) == (sum(LENGTHS), 320)
    assert counts["squares"] == sum(n * n for n in LENGTHS)


def test_rows_are_filled_up_where_that_is_worth_it() -> None:
    def asked(device: torch.device, **keys: Any) -> bool:
        tree: dict[str, Any] = {"train": {}, "data": {}}
        for key, value in keys.items():
            section, _, name = key.partition("__")
            tree[section][name] = value
        return one_shape(Config.model_validate(tree), device)

    assert asked(GPU) and not asked(CPU)
    assert asked(CPU, train__compile=True) and asked(CPU, train__static_shapes=True)
    assert not asked(GPU, train__static_shapes=False)
    assert not asked(GPU, data__mode="padded")
    assert not asked(GPU, data__audio_per_batch=60.0)  # which may end rows that are half full
    assert asked(GPU, data__audio_per_batch=60.0, train__static_shapes=True)


def lines(folder: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    train(worlds.start(worlds.tiny(folder, name, **changes), World.current()))
    return read_lines(folder / "runs" / name / "metrics.jsonl")


def test_a_run_has_the_same_losses_and_says_what_is_padding(tmp_path: Path) -> None:
    plain = lines(tmp_path, "plain")
    filled = lines(tmp_path, "filled", train__static_shapes=True)
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in filled] == pytest.approx(
            [line[key] for line in plain], rel=1e-4
        )
    assert [line["loss"] for line in filled[:1]] == pytest.approx([plain[0]["loss"]], rel=1e-6)
    assert all(line["padding"] > 0 for line in filled)
    assert not any(line["padding"] for line in plain)
    started = read_lines(tmp_path / "runs" / "filled" / "events.jsonl")[0]
    assert started["static_shapes"] is True and started["precision"] == "fp32"


@pytest.mark.slow
def test_of_fifty_batches_one_shape_is_compiled(tmp_path: Path) -> None:
    """As many graphs as of the first batch alone; and the losses of what is not compiled."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    lines(tmp_path, "one", train__compile=True, train__max_steps=1)
    first = counters["stats"]["unique_graphs"]
    assert first
    found = lines(tmp_path, "fifty", train__compile=True, train__max_steps=25)  # of two lanes
    assert counters["stats"]["unique_graphs"] == first
    assert not counters["recompiles"]
    plain = lines(tmp_path, "plain", train__max_steps=25)
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in found] == pytest.approx(
            [line[key] for line in plain], rel=1e-4
        )
