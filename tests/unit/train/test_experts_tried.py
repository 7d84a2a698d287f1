"""model.moe.experts: auto is tried once in a run's life, told, and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from raysft.config import Config
from raysft.driver import preflight
from raysft.errors import UserError
from raysft.models import fastest
from raysft.parallel import World
from raysft.parallel.blocks import experts_of
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support.models import CAUSAL
from tests.support.worlds import start, tiny

MOE = {
    **CAUSAL["config"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def run(config: Config) -> list[float]:
    """The losses of all its steps so far, trained to the end of the config."""
    job = start(config, World.current())
    train(job)
    return [line["loss"] for line in read_lines(job.folder / "metrics.jsonl")]


def mixture(folder: Path, name: str, experts: str, steps: int = 4) -> Config:
    moe = {"experts": experts} if experts else None
    return tiny(
        folder,
        name,
        model__config=MOE,
        model__moe=moe,
        train__max_steps=steps,
        checkpoint__every=0,
    )


def test_the_fastest_is_taken_told_and_kept_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(net: torch.nn.Module, device: object, dtype: object, tokens: int) -> object:
        asked.append((len(experts_of(net)), dtype, tokens))
        return fastest.Tried({"torch": 2.0, "loop": 1.0})

    monkeypatch.setattr(fastest, "milliseconds", measured)
    whole = run(mixture(tmp_path, "whole", "auto"))
    folder = tmp_path / "runs" / "cut"
    first = run(mixture(tmp_path, "cut", "auto", 2))
    assert asked == [(2, torch.float32, 120)] * 2

    monkeypatch.setattr(fastest, "milliseconds", None)  # another machine of the day
    job = start(mixture(tmp_path, "cut", "auto"), World.current())
    computing = {e.config._experts_implementation for _, e in experts_of(job.strategy.module)}
    assert computing == {"raysft_loop"}
    train(job)
    both = [line["loss"] for line in read_lines(folder / "metrics.jsonl")]

    assert both[:2] == first and both == whole
    events = read_lines(folder / "events.jsonl")
    told = [line["experts"] for line in events if line["event"] in ("started", "continued")]
    assert told == [{"backend": "loop", "ms": {"torch": 2.0, "loop": 1.0}}] * 2


def test_what_fails_when_it_is_tried_is_told_and_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a kernel that cannot be fetched: only its use shows it."""

    def fails(*_: object) -> torch.Tensor:
        raise ImportError("no kernel for this device\n(see the page)")

    monkeypatch.setattr(fastest, "candidates", lambda *_: ["sonicmoe", "loop"])
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "raysft_sonicmoe", fails)
    job = start(mixture(tmp_path, "run", "auto"), World.current())
    known = json.loads((job.folder / "experts.json").read_text())
    assert known["backend"] == "loop" and known["ms"].keys() == {"loop"}
    assert known["failed"] == {"sonicmoe": "no kernel for this device (see the page)"}
    assert job.start["experts"] == known

    monkeypatch.setattr(fastest, "candidates", lambda *_: ["sonicmoe"])
    with pytest.raises(UserError, match=r"^model\.moe\.experts: auto: .* \(sonicmoe: no kernel"):
        start(mixture(tmp_path, "none", "auto"), World.current())


def test_any_way_to_compute_gives_the_losses_of_none_asked_for(tmp_path: Path) -> None:
    losses = {name: run(mixture(tmp_path, name or "none", name)) for name in ("", "torch", "loop")}

    assert losses["torch"] == pytest.approx(losses[""], rel=1e-5)
    assert losses["loop"] == pytest.approx(losses[""], rel=1e-5)


def test_what_cannot_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = mixture(tmp_path, "run", "grouped_gemm")
    config.train.precision = "bf16"
    with pytest.raises(UserError, match=r"^model\.moe\.experts: grouped_gemm is not installed; "):
        preflight.check(config)
    dense = tiny(tmp_path, "dense", model__moe={})
    with pytest.raises(UserError, match=r"^model\.moe: Qwen3ForCausalLM has no experts .* leave"):
        preflight.check(dense)
    assert not (tmp_path / "runs").exists()
