"""A mixture under `ep`: what one worker makes of it, whoever has the experts.

Four gloo processes and six lanes, so that in a step's second turn two of them have none (two
processes in `make test`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raysft.audit import audit
from raysft.config import Config, to_yaml
from raysft.data.encode import make_encoder
from raysft.export import export
from raysft.models import build
from raysft.run.catalogue import Catalogue
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from raysft.train.checkpoint import read_weights
from tests.support import worlds
from tests.support.mixtures import MIXTURES
from tests.support.worlds import tiny

STEPS = 10


def mixture(kind: str = "qwen3_moe", **more: Any) -> dict[str, Any]:
    """A model section of a small mixture, whose vocabulary is the tokenizer's."""
    own = {
        key: value
        for key, value in MIXTURES[kind].items()
        if key != "vocab_size" and not key.endswith("token_id")
    }
    settings = {**own, **more, "model_type": kind}
    return {"tokenizer": "bytes", "speech_units": 20, "config": settings}


def exported(base: Path) -> dict[str, Any]:
    """The model section of an exported `mixture`."""
    return {"path": str(base), "config": None, "tokenizer": None, "speech_units": 20}


def write(folder: Path, name: str, **changes: Any) -> Path:
    """A config of six lanes. changes: section__key=value, or whole as model= and parallel=."""
    changes = {
        "data__lanes": 6,
        "train__max_steps": STEPS,
        "optim__clip": 0.1,
        "optim__weight_decay": 0.0,
        "checkpoint__every": 4,
        **changes,
    }
    for section, default in (("model", mixture()), ("parallel", {})):
        for key, value in (changes.pop(section, None) or default).items():
            changes[f"{section}__{key}"] = value
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(tiny(folder, name, **changes)))
    return path


def train(size: int, *configs: Path, left_at: int = 0) -> None:
    assert worlds.run(size, *configs, kill_at=left_at, module="tests.support.matrix") == 0


def column(folder: Path, name: str, key: str) -> list[float]:
    return [line[key] for line in read_lines(folder / "runs" / name / "metrics.jsonl")]


def weights(folder: Path, name: str, first: bool = False) -> dict[str, torch.Tensor]:
    """Of the last checkpoint of a run, or of the first that is kept."""
    run = folder / "runs" / name
    saved = Catalogue.of(read_config(run).checkpoint, run).committed()[0 if first else -1]
    return read_weights(saved)


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_that_share_experts_train_as_one(workers: int, tmp_path: Path) -> None:
    """Losses, evaluation with answers, weights; resumed to the last bit. With four also in pairs,
    and with gradient checkpointing."""
    evaluation = {
        "data__eval": [{"path": str(worlds.units(tmp_path))}],
        "evaluate__every": STEPS,
        "evaluate__max_examples": 10,
        "evaluate__max_new_tokens": 8,
        "data__lanes": workers + workers // 2,  # some have none in a step's second turn
    }
    one = write(tmp_path, "one", **evaluation)
    ep = {"strategy": "ep"}
    names = ["shared", "again_shared"]
    shared = [write(tmp_path, name, parallel=ep, **evaluation) for name in names]
    if workers == 4:
        pairs = {**ep, "ep_size": 2}
        more = {**evaluation, "train__gradient_checkpointing": True}
        shared.append(write(tmp_path, "pairs", parallel=pairs, **more))
    train(1, one)
    train(workers, *shared, left_at=7)
    for path in shared:
        for key, rel in (("loss", 1e-5), ("grad_norm", 1e-4)):
            expected = pytest.approx(column(tmp_path, "one", key), rel=rel)
            assert column(tmp_path, path.stem, key) == expected, (path.stem, key)
        moved = json.loads((tmp_path / "runs" / path.stem / "moved.json").read_text())
        assert all(each["moved"] for each in moved.values())
    for key in ("loss", "grad_norm"):
        assert column(tmp_path, "again_shared", key) == column(tmp_path, "shared", key)
    assert audit(tmp_path / "runs" / "again_shared").clean
    assert measured(tmp_path, "shared") == pytest.approx(measured(tmp_path, "one"), rel=1e-4)
    expected, found = weights(tmp_path, "one"), weights(tmp_path, "shared")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def measured(folder: Path, name: str) -> dict[str, float]:
    """What the last evaluation of a run says, but for times."""
    line = read_lines(folder / "runs" / name / "eval.jsonl")[-1]
    return {k: v for k, v in line.items() if isinstance(v, float) and "seconds" not in k}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXTURES)
def test_every_mixture_trains_alike_whoever_has_the_experts(kind: str, tmp_path: Path) -> None:
    """20 steps: losses to 1e-5, norms to 1e-4."""
    model = mixture(kind)
    one = write(tmp_path, "one", model=model, train__max_steps=20)
    shared = [
        write(tmp_path, name, model=model, train__max_steps=20, parallel=parallel)
        for name, parallel in (
            ("fsdp", {"strategy": "fsdp"}),
            ("of_four", {"strategy": "ep", "ep_size": 4}),
            ("of_two", {"strategy": "ep", "ep_size": 2}),
        )
    ]
    train(1, one)
    train(4, *shared)
    for path in shared:
        for key, rel in (("loss", 1e-5), ("grad_norm", 1e-4)):
            expected = pytest.approx(column(tmp_path, "one", key), rel=rel)
            assert column(tmp_path, path.stem, key) == expected, (path.stem, key)


@pytest.mark.slow
def test_adapters_of_experts_lie_with_their_experts(tmp_path: Path) -> None:
    """20 steps, base frozen: the losses of one worker, and each adapter moves that got a token."""
    base = tmp_path / "base"
    config = Config.model_validate({"model": mixture()})
    export(
        build(config.model, config.data, make_encoder(config.model, config.data, tmp_path), 1), base
    )
    settings = {
        "model": exported(base),
        "peft__method": "lora",
        "peft__r": 8,
        "peft__experts": True,
        "train__max_steps": 20,
    }
    ep = {"strategy": "ep"}
    train(1, write(tmp_path, "one", **settings))
    shared = [
        write(tmp_path, "fsdp", **settings, parallel={"strategy": "fsdp"}),
        write(tmp_path, "of_four", **settings, parallel=ep),
        write(tmp_path, "again_of_four", **settings, parallel=ep),
        write(tmp_path, "of_two", **settings, parallel={**ep, "ep_size": 2}),
    ]
    train(4, *shared, left_at=7)
    for path in shared:
        for key, rel in (("loss", 1e-5), ("grad_norm", 1e-4)):
            expected = pytest.approx(column(tmp_path, "one", key), rel=rel)
            assert column(tmp_path, path.stem, key) == expected, (path.stem, key)
        moved = json.loads((tmp_path / "runs" / path.stem / "moved.json").read_text())
        assert all(each["moved"] == each["trains"] for each in moved.values())
    assert column(tmp_path, "again_of_four", "loss") == column(tmp_path, "of_four", "loss")
    assert audit(tmp_path / "runs" / "again_of_four").clean
    assert any(".experts.lora" in name for name in weights(tmp_path, "of_two"))


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_kinds_of_tokens_keep_to_their_experts_wherever_these_lie(
    several: bool, tmp_path: Path
) -> None:
    """One router or one a kind, with their losses: the figures of one worker, and its loads."""
    groups: dict[str, Any] = {
        "text": {"ids": "rest", "experts": "0-3"},
        "audio": {"ids": "259-278", "experts": "4-7"},
    }
    modality = {"groups": groups, **({"from": "one_router"} if several else {"softmax": "all"})}
    moe = {"modality": modality, "balance": 0.01, "z_loss": 0.001}
    settings = {"model": {**mixture(), "moe": moe}}
    train(1, write(tmp_path, "one", **settings))
    shared = [
        write(tmp_path, "fsdp", **settings, parallel={"strategy": "fsdp"}),
        write(tmp_path, "zero3", **settings, parallel={"strategy": "zero3"}),
        write(tmp_path, "shared", **settings, parallel={"strategy": "ep"}),
        write(tmp_path, "again_shared", **settings, parallel={"strategy": "ep"}),
    ]
    train(2, *shared, left_at=7)
    keys = ("loss", "grad_norm", "term/balance/audio", "term/z/text", "experts/load_max/audio")
    for path in shared:
        for key in keys:
            expected = pytest.approx(column(tmp_path, "one", key), rel=1e-4)
            assert column(tmp_path, path.stem, key) == expected, (path.stem, key)
    assert column(tmp_path, "again_shared", "loss") == column(tmp_path, "shared", "loss")


@pytest.mark.slow
def test_gradients_of_experts_are_those_of_the_whole_global_batch(tmp_path: Path) -> None:
    one = write(tmp_path, "one")
    shared = [
        write(tmp_path, f"of_{n}", parallel={"strategy": "ep", "ep_size": n}) for n in (1, 2, 4)
    ]
    train(1, one, left_at=-1)
    train(4, *shared, left_at=-1)
    expected = load_file(tmp_path / "runs" / "one" / "gradient.safetensors")
    assert any("experts" in name for name in expected)
    for path in shared:
        found = load_file(tmp_path / "runs" / path.stem / "gradient.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            largest = float(gradient.abs().max())
            difference = float((found[name] - gradient).abs().max())
            assert difference <= 1e-6 * max(largest, 1e-2), f"{path.stem}: {name}: {difference:.1e}"


@pytest.mark.slow
def test_a_checkpoint_goes_to_any_group_and_any_strategy(tmp_path: Path) -> None:
    """Left by experts of four at step 7; taken up by others, from step 4."""
    train(1, write(tmp_path, "one"))
    left = write(tmp_path, "left_run", parallel={"strategy": "ep"})
    train(4, left, left_at=7)
    others: dict[str, tuple[int, dict[str, Any]]] = {
        "again": (4, {"strategy": "ep"}),
        "pairs": (4, {"strategy": "ep", "ep_size": 2}),
        "two": (2, {"strategy": "ep"}),
        "fsdp": (4, {"strategy": "fsdp"}),
        "zero3": (4, {"strategy": "zero3"}),
        "alone": (1, {"strategy": "ddp"}),
    }
    begun = tmp_path / "runs"
    for name, (size, parallel) in others.items():
        shutil.copytree(begun, tmp_path / name)
        storage = str(tmp_path / name)
        config = write(tmp_path, "left_run", parallel=parallel, run__storage_path=storage)
        train(size, config)
        run = tmp_path / name / "left_run"
        lines = read_lines(run / "metrics.jsonl")
        assert [line["loss"] for line in lines] == pytest.approx(
            column(tmp_path, "one", "loss"), rel=1e-5
        ), name
        assert audit(run).clean, name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ep", "zero3", "fsdp"])
def test_tokens_that_all_choose_one_expert_train_without_a_hang(
    strategy: str, tmp_path: Path
) -> None:
    """Three of four workers hold experts that no token is sent to."""
    base = tmp_path / "base"
    config = Config.model_validate({"model": mixture(num_experts_per_tok=1)})
    encoder = make_encoder(config.model, config.data, tmp_path)
    made = build(config.model, config.data, encoder, 1)
    for name, parameter in made.net.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.zero_()  # all alike: the same one is taken
    export(made, base)
    settings = {
        "model": exported(base),
        "train__freeze": ["*.gate.weight"],
        "checkpoint__every": 1,
        "checkpoint__keep": 9,
        "train__max_steps": 4,
    }
    train(1, write(tmp_path, "one", **settings))
    train(4, write(tmp_path, "shared", **settings, parallel={"strategy": strategy}))
    assert column(tmp_path, "shared", "loss") == pytest.approx(
        column(tmp_path, "one", "loss"), rel=1e-5
    )
    before, after = weights(tmp_path, "shared", first=True), weights(tmp_path, "shared")
    experts = [name for name in after if ".experts." in name]
    assert experts
    for name in experts:
        moved = (after[name] != before[name]).flatten(1).any(1)
        assert int(moved.sum()) == 1, name
