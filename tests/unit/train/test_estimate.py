"""The memory that --dry-run tells of is what workers hold: tensors counted in them, each once."""

from __future__ import annotations

import gc
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from raysft import worker
from raysft.config import Config
from raysft.data.encode import make_encoder
from raysft.objectives.frozen import Frozen
from raysft.parallel import World, make_strategy
from raysft.train.estimate import _kept, estimate
from tests.support import audio_tiny, worlds
from tests.support.model_zoo import CONFIGS, batch_of, sequences

WORKERS = 2
MODEL = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2000,
}


MIXTURE = {
    **{name: size for name, size in MODEL.items() if name != "model_type"},
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}


def held() -> int:
    """Bytes of all tensors of this process, and of their gradients."""
    gc.collect()
    sizes: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [one for one in gc.get_objects() if type(one) in KINDS]
        found += [one.grad for one in found if one.is_leaf and one.grad is not None]
    for tensor in found:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    sizes.pop(0, None)
    return sum(sizes.values())


KINDS = (torch.Tensor, torch.nn.Parameter, DTensor)


def measure(rank: int, folder: Path, keys: dict[str, Any]) -> None:
    """Two steps; writes what was held most of the time, and the estimate."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS
    )
    before = held()
    config = Config.model_validate(
        {
            "data": {"tokens_per_batch": 64, "lanes": WORKERS},
            "model": {"tokenizer": "bytes", "config": MODEL},
            **keys,
        }
    )
    encoder = make_encoder(config.model, config.data, folder)
    model, _ = worker.build_model(config, encoder, 10)
    expected = estimate(config, model, WORKERS).state(WORKERS)
    strategy = make_strategy(config, model.supervised, World.current())
    reference = Frozen(strategy.module) if config.train.referenced else None
    seen = 0
    for _ in range(2):
        batch = model.collate(batch_of(*sequences(model, [9, 4])))
        with strategy.accumulate(last=True):
            with strategy.autocast():
                loss = strategy.module(batch)[0].trained
            strategy.backward(loss)
        del loss, batch
        seen = held()
        strategy.step(0.1)
    del reference
    if rank == 0:
        (folder / "seen.json").write_text(json.dumps([seen - before, expected]))
    dist.barrier()
    dist.destroy_process_group()


QUICK = [("fsdp", "lora", "bf16")]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(
        ("ddp", "fsdp", "zero1", "zero2", "zero3"), ("none", "lora"), ("fp32", "bf16")
    )
]


@pytest.mark.parametrize(("strategy", "method", "precision"), CASES)
def test_what_is_told_is_held(strategy: str, method: str, precision: str, tmp_path: Path) -> None:
    """To 20%; of ddp and fsdp to 2%."""
    keys = {
        "parallel": {"strategy": strategy, "workers": WORKERS},
        "train": {"precision": precision},
        "peft": {"method": method, **({"r": 64} if method == "lora" else {})},
    }
    seen, expected = measured(tmp_path, keys)
    assert expected == pytest.approx(seen, rel=0.02 if strategy in ("ddp", "fsdp") else 0.2)


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_reference_is_held_and_told(strategy: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"parallel": {"strategy": strategy, "workers": WORKERS}}
    train = {"precision": "fp32", "objective": "dpo"}
    seen, expected = measured(tmp_path, {**keys, "train": train})
    assert expected == pytest.approx(seen, rel=0.02)


def measured(folder: Path, keys: dict[str, Any]) -> tuple[float, float]:
    """Bytes that a worker was seen to hold, and the estimate."""
    processes = [worlds.fork(measure, rank, folder, keys) for rank in range(WORKERS)]
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0] * WORKERS
    seen, expected = json.loads((folder / "seen.json").read_text())
    return seen, expected


OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": MODEL,
    "qwen3_moe": MIXTURE,
    "llama": {**MODEL, "model_type": "llama", "num_key_value_heads": 4, "vocab_size": 32000},
    "wide": {**MODEL, "intermediate_size": 1536, "num_hidden_layers": 2},
}


ALL = {f"text {name}": config for name, config in CONFIGS.items()}
ALL |= {f"audio {name}": tiny.config for name, tiny in audio_tiny.TINY.items()}
ALL |= {"whisper": {"model_type": "whisper"}, "moonshine": {"model_type": "moonshine"}}


@pytest.mark.parametrize("name", ALL)
def test_a_layer_of_any_model_keeps_something(name: str) -> None:
    """Whatever its config calls the sizes of its layers."""
    given = dict(ALL[name])
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    text = config.get_text_config()
    assert text.vocab_size and text.num_hidden_layers
    assert 20 * text.hidden_size < _kept(text, torch.nn.Module(), 4) < 600 * text.hidden_size


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OTHERS)
def test_activations_are_those_that_autograd_keeps(
    name: str, precision: str, tmp_path: Path
) -> None:
    """To 20%: what it saves for the backward pass, weights aside, each storage once."""
    tokens = 512
    config = Config.model_validate(
        {
            "data": {"tokens_per_batch": tokens, "lanes": 1},
            "model": {"tokenizer": "bytes", "config": OTHERS[name]},
            "train": {"precision": precision},
        }
    )
    encoder = make_encoder(config.model, config.data, tmp_path)
    model, _ = worker.build_model(config, encoder, 10)
    strategy = make_strategy(config, model.supervised, World.current())
    weights = {one.untyped_storage().data_ptr() for one in model.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = model.collate(batch_of(*sequences(model, [tokens // 4] * 4)))
    with (
        strategy.accumulate(last=True),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        strategy.autocast(),
    ):
        loss = strategy.module(batch)[0].trained
    seen = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert loss.isfinite()
    assert estimate(config, model, 1).activations == pytest.approx(seen, rel=0.2)


@pytest.mark.parametrize("method", ["none", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_what_is_told_of_workers_that_share_experts_is_held(
    method: str, precision: str, tmp_path: Path
) -> None:
    """To 20%."""
    keys = {
        "model": {"tokenizer": "bytes", "config": MIXTURE},
        "parallel": {"strategy": "ep", "ep_size": WORKERS, "workers": WORKERS},
        "train": {"precision": precision},
        "peft": {"method": method, **({"r": 64} if method == "lora" else {})},
    }
    seen, expected = measured(tmp_path, keys)
    assert expected == pytest.approx(seen, rel=0.2)
