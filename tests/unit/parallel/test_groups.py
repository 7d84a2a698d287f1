"""What FSDP2 gathers together: a layer, the embedding, the head; and what it computes by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from raysft.losses import chunked
from raysft.models import SpeechModel
from raysft.parallel import Strategy, World, make_strategy
from raysft.parallel.blocks import blocks, tables_of
from tests.support import audio_zoo, worlds
from tests.support.model_zoo import batch_of, make, sequences
from tests.support.zero_lab import make_config

LENGTHS, STEPS = [9, 4, 17], 2


def names_of(module: nn.Module, parts: list[nn.Module]) -> list[str]:
    named = {part: name for name, part in module.named_modules()}
    return [named[part] for part in parts]


def test_a_layer_is_one_block_with_its_attention() -> None:
    found = names_of(module := make("qwen2_audio").net, blocks(module))
    assert sorted(name.rpartition(".layers.")[2] for name in found) == ["0", "0", "1", "1"]
    assert sum("audio_tower" in name for name in found) == 2


def test_layers_in_a_stack_that_is_listed_too_are_blocks_of_their_own() -> None:
    kind = "qwen2_5_omni_thinker"
    spoken = audio_zoo.spoken_of(kind)
    net = audio_zoo.net_of(kind, audio_zoo.config_of(kind, spoken))
    found = names_of(net, blocks(net))
    layers = [name for name in found if "audio_tower.layers." in name]
    assert layers
    assert found.index("model.audio_tower") > max(map(found.index, layers)), "innermost first"


def test_tables_are_apart_and_together_where_they_share_a_weight() -> None:
    net = make("llama").net
    assert tables_of(net) == ([net.model.embed_tokens], [net.lm_head])
    tied = make("qwen3_tied").net
    assert tables_of(tied) == ([], [tied.model.embed_tokens, tied.lm_head])
    assert tables_of(nn.Linear(2, 2)) == ([], [])


def step(model: SpeechModel, strategy: Strategy) -> list[float]:
    batch = model.collate(batch_of(*sequences(model, LENGTHS)))
    with strategy.accumulate(last=True):
        loss = strategy.module(batch)[0].trained
        strategy.backward(loss)
    return [loss.item(), strategy.step(1.0).norm]


def whole_in_layers(model: SpeechModel, strategy: Strategy) -> list[list[str]]:
    """Names of the parameters that are whole while each decoder layer runs, those of vectors
    aside."""
    module, found = strategy.module, []

    def look(_module: nn.Module, _args: object) -> None:
        found.append(
            [
                name
                for name, parameter in module.named_parameters()
                if parameter.ndim > 1 and not isinstance(parameter, DTensor)
            ]
        )

    hooks = [layer.register_forward_pre_hook(look) for layer in model.net.get_decoder().layers]
    with torch.no_grad():
        module(model.collate(batch_of(*sequences(model, LENGTHS))))
    for hook in hooks:
        hook.remove()
    return found


def _trains(rank: int, folder: Path, name: str) -> None:
    """One of two workers, on the same micro-batch: the mean is that of one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world, found = World.current(), {}
    for rows in (None, 5):
        model = make(name)
        model.supervised.rows = rows
        strategy = make_strategy(make_config("fsdp"), model.supervised, world)
        lines = [step(model, strategy) for _ in range(STEPS)]
        found[str(rows)] = [lines, whole_in_layers(model, strategy)]
    model = make(name)
    strategy = make_strategy(make_config("fsdp"), model.supervised, world)
    with strategy.whole():  # before any training
        found["answers"] = model.generate(sequences(model, [5, 8]), 6)
    found["after"] = step(model, strategy)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name", ["llama", "qwen3_tied", pytest.param("qwen2_audio", marks=pytest.mark.slow)]
)
def test_tables_are_gathered_by_themselves_and_losses_are_those_of_one_process(
    name: str, tmp_path: Path
) -> None:
    workers = [worlds.fork(_trains, rank, tmp_path, name) for rank in range(2)]
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = json.loads((tmp_path / "1.json").read_text())
    one = World(0, 1, torch.device("cpu"))
    model = make(name)
    answers = model.generate(sequences(model, [5, 8]), 6)
    strategy = make_strategy(make_config("ddp"), model.supervised, one)
    expected = [step(model, strategy) for _ in range(STEPS)]
    supervised = len(model.collate(batch_of(*sequences(model, LENGTHS)))["keep"])
    assert 5 < supervised < chunked.chunk_rows(400, one.device), "in chunks of 5, and in one"
    for rows in ("None", "5"):
        lines, held = found[rows]
        for line, wanted in zip(lines, expected, strict=True):
            assert line == pytest.approx(wanted, rel=1e-6)
        assert len(held) == 2
        for number, names in enumerate(held):
            rest = [each for each in names if f"layers.{number}." not in each]
            assert len(rest) < len(names)
            assert not [each for each in rest if ".layers." in each]
            tables = [each for each in rest if "embed_tokens" in each or "lm_head" in each]
            # A table that is the head too stays from one to the other.
            assert bool(tables) is (name == "qwen3_tied")
    assert found["answers"] == answers
    assert found["after"] == pytest.approx(expected[0], rel=1e-6)
