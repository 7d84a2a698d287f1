"""train.compile changes how a step is computed, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysft.config.load import validate
from raysft.errors import UserError
from raysft.models.compiled import compile_blocks
from raysft.parallel import World
from raysft.parallel.blocks import blocks
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.properties.test_experts import mixture
from tests.support import worlds
from tests.support.model_zoo import make

CPU = torch.device("cpu")


def lines(folder: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    config = worlds.tiny(folder, name, train__max_steps=5)
    tree = config.model_dump()
    for key, value in changes.items():
        section, _, key = key.partition("__")
        tree[section] = {**tree[section], key: value} if key else value
    config = validate(tree, "test")
    train(worlds.start(config, World.current()))
    return read_lines(folder / "runs" / name / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_are_those_of_what_is_not_compiled(checkpointing: bool, tmp_path: Path) -> None:
    same = {"train__gradient_checkpointing": checkpointing}
    plain = lines(tmp_path, "plain", **same)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = lines(tmp_path, "compiled", train__compile=True, **same)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in found] == pytest.approx(
            [line[key] for line in plain], rel=1e-4
        )


KINDS: dict[str, Any] = {
    "text": {"ids": "rest", "experts": "0-3"},
    "audio": {"ids": "259-278", "experts": "4-7"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "moe"),
    [
        (False, {"experts": "loop"}),
        (
            False,
            {
                "experts": "torch",
                "modality": {"groups": KINDS, "softmax": "all"},
                "balance": 0.01,
                "z_loss": 0.01,
            },
        ),
        (
            True,
            {
                "experts": "torch",
                "modality": {"groups": KINDS, "from": "one_router"},
                "balance": 0.01,
                "balance_over": "sequence",
            },
        ),
    ],
    ids=["loop", "kinds", "a router each, checkpointed"],
)
def test_mixtures_are_compiled_with_their_routers(
    checkpointing: bool, moe: dict[str, Any], tmp_path: Path
) -> None:
    """Losses, their terms and what is told of the experts are those of what is not compiled."""
    same = {"model": {**mixture(), "moe": moe}, "train__gradient_checkpointing": checkpointing}
    plain = lines(tmp_path, "plain", **same)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = lines(tmp_path, "compiled", train__compile=True, **same)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    told = [
        k for k in plain[0] if k in ("loss", "grad_norm") or k.startswith(("term/", "experts/"))
    ]
    assert "experts/load_max/audio" in told or "modality" not in moe
    for key in told:
        assert [line[key] for line in found] == pytest.approx(
            [line[key] for line in plain], rel=1e-3
        ), key
    sent = [
        read_lines(tmp_path / "runs" / name / "experts.jsonl") for name in ("plain", "compiled")
    ]
    for one, other in zip(*sent, strict=True):
        for kind, table in one["tokens"].items():  # a choice may turn on a last bit
            assert np.abs(np.array(table) - np.array(other["tokens"][kind])).max() <= 2


@pytest.mark.slow
def test_lengths_are_compiled_once(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    as_they_are = {"train__compile": True, "train__static_shapes": False}
    lines(tmp_path, "short", **as_they_are)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    lines(tmp_path, "other", **as_they_are, data__tokens_per_batch=173)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_names_of_parameters_stay() -> None:
    adapter = make("qwen3")
    before = list(adapter.supervised.state_dict())
    compile_blocks(blocks(adapter.supervised), CPU)
    assert list(adapter.supervised.state_dict()) == before


def test_evaluation_is_not_compiled() -> None:
    adapter = make("qwen3")
    ids = torch.arange(6).unsqueeze(0)
    adapter.model.eval()
    before = adapter.model(ids).logits
    torch._dynamo.utils.counters.clear()
    compile_blocks(blocks(adapter.supervised), CPU)
    assert torch.equal(adapter.model(ids).logits, before)
    assert not torch._dynamo.utils.counters["frames"]


def test_without_a_compiler_it_is_a_readable_line() -> None:
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    # By torch's own patch: put back by pytest's, the setting would be gone for the tests below.
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match=r"train\.compile: needs a C\+\+ compiler"),
    ):
        compile_blocks([], CPU)


@pytest.mark.slow
def test_rare_shapes_are_compiled_too() -> None:
    """More than the 8 after which torch gives a function up."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block = torch.nn.Sequential(torch.nn.Linear(4, 4))
    compile_blocks([block], CPU, [block])
    for length in range(2, 14):
        block(torch.zeros(length, 4))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 12
