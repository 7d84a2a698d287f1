"""Optimizer groups, schedules, the loss scale, steps that are skipped, 8-bit state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raysft.config.schedule import rate
from raysft.config.schema import Config, Optim
from raysft.errors import UserError
from raysft.parallel import World, scale
from raysft.parallel.ddp import Ddp
from raysft.parallel.optim import parameter_groups
from raysft.parallel.scale import LossScale
from raysft.run.lines import read_lines
from raysft.train.job import Job
from raysft.train.loop import train
from tests.support.worlds import start, tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
torch.set_num_threads(1)
ONE = World.current()


class Net(nn.Module):
    """Two parts with a norm and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower(x)).square().sum()


def grouped(**settings: Any) -> dict[str, tuple[float, float]]:
    """Name -> (peak rate, weight decay)."""
    net = Net()
    names = {id(p): name for name, p in net.named_parameters()}
    groups = parameter_groups(net.named_parameters(), Optim.model_validate(settings))
    return {
        names[id(p)]: (group["peak"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


def test_groups_have_their_own_rate_and_decay_and_norms_and_biases_never_decay() -> None:
    groups = [{"match": ["tower.0.*"], "lr": 1e-5}, {"match": ["tower.*"], "weight_decay": 0.5}]
    assert grouped(lr=1e-3, weight_decay=0.1, groups=groups) == {
        "tower.0.weight": (1e-5, 0.1),
        "tower.0.bias": (1e-5, 0.0),
        "tower.1.weight": (1e-3, 0.0),
        "tower.1.bias": (1e-3, 0.0),
        "head.weight": (1e-3, 0.1),
        "head.bias": (1e-3, 0.0),
    }


def test_a_group_that_matches_nothing_is_told_with_near_names() -> None:
    with pytest.raises(UserError, match=r"optim\.groups\[0\]\.match: towr\.\* .*tower"):
        grouped(groups=[{"match": ["towr.*"]}])


@pytest.mark.parametrize("warmup, decay", [(0, 0.25), (4, 10), (0.1, 0.5)])
def test_wsd_is_warm_up_then_constant_then_a_linear_fall(warmup: float, decay: float) -> None:
    optim, total = Optim(schedule="wsd", warmup=warmup, decay=decay), 40
    rising, falling = (round(x if x >= 1 else x * total) for x in (warmup, decay))
    expected = [(i + 1) / rising for i in range(rising)]
    expected += [1.0] * (total - rising - falling)
    expected += [1 - i / falling for i in range(falling)]
    assert [rate(optim, step, total) for step in range(1, total + 1)] == pytest.approx(expected)


def test_the_loss_scale_moves_as_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch.amp.GradScaler on the CPU, over overflows and many finite steps."""
    many = 30
    monkeypatch.setattr(scale, "GROW_AFTER", many)
    theirs = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=many)
    ours = LossScale(dynamic=True)
    weight = nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([weight], lr=0.0)
    for step in range(3 * many):
        finite = step not in (0, 1, 5, many + 2)
        weight.grad = torch.full((1,), 1.0 if finite else math.inf)
        theirs.scale(torch.zeros(()))  # its scale is made when it is first used
        theirs.step(sgd)
        theirs.update()
        ours.update(finite)
        assert ours.value == theirs.get_scale(), step
    again = LossScale(dynamic=True)
    again.load(ours.state())
    assert again.state() == ours.state()


def test_clipping_and_steps_are_those_of_plain_torch_also_under_a_loss_scale() -> None:
    x = torch.randn(16, 8)
    results = []
    for precision in ("fp32", "fp16"):
        config = Config.model_validate(
            {"optim": {"lr": 0.01, "clip": 0.5}, "train": {"precision": precision}}
        )
        ours, norms = Ddp(config, Net(), ONE), []
        for _ in range(5):
            ours.backward(ours.module(x))  # outside autocast: only the scale differs
            norms.append(ours.step(1.0).norm)
        results.append((norms, [p.detach() for p in ours.module.parameters()]))
    net = Net()
    groups = [{"params": list(net.parameters()), "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, 0.01, (0.9, 0.95))
    expected = []
    for _ in range(5):
        net(x).backward()
        expected.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        adam.step()
        adam.zero_grad()
    for norms, weights in results:
        assert norms == pytest.approx(expected, rel=1e-5)
        for ours_, theirs in zip(weights, net.parameters(), strict=True):
            torch.testing.assert_close(ours_, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_save_before_the_first_step_that_moves_changes_no_later_step() -> None:
    weights = []
    for saves in (False, True):
        torch.manual_seed(1)
        ours = Ddp(Config.model_validate({"optim": {"lr": 0.01}}), Net(), ONE)
        if saves:
            state = ours.state()
            assert {float(moments["step"]) for moments in state["optim"].values()} == {0.0}
        for _ in range(3):
            ours.backward(ours.module(torch.randn(4, 8)))
            ours.step(1.0)
        weights.append(list(ours.module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


class Spoilt:
    """A strategy whose gradients are not finite at some steps."""

    def __init__(self, job: Job, steps: set[int]) -> None:
        self.inner, self.steps, self.step_number = job.strategy, steps, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, *args: Any) -> Any:
        self.step_number += 1
        if self.step_number in self.steps:
            next(p for p in self.inner.module.parameters() if p.requires_grad).grad[0] = math.nan
        return self.inner.step(*args)


def spoil(folder: Path, steps: set[int], **changes: Any) -> Job:
    job = start(tiny(folder, **changes), ONE)
    job.strategy = Spoilt(job, steps)  # type: ignore[assignment]
    return job


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    job = spoil(tmp_path, {3, 4, 9})
    train(job)
    lines = read_lines(job.folder / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3]
    assert math.isfinite(lines[-1]["loss"])
    events = [e for e in read_lines(job.folder / "events.jsonl") if e["event"] == "skipped_step"]
    assert [(e["step"], e["in_a_row"]) for e in events] == [(3, 1), (4, 2), (9, 1)]
    assert all(bool(p.isfinite().all()) for p in job.strategy.module.parameters())


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    job = spoil(tmp_path, {3, 4, 6, 7, 8}, optim__max_skipped=2)
    with pytest.raises(UserError, match=r"optim\.max_skipped: the gradients of 3 steps in a row"):
        train(job)
    assert read_lines(job.folder / "metrics.jsonl")[-1]["step"] == 7


def test_fp16_learns_and_its_scale_comes_back_with_the_checkpoint(tmp_path: Path) -> None:
    whole = start(tiny(tmp_path, "whole", train__precision="fp16"), ONE)
    train(whole)
    lines = read_lines(whole.folder / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    ended = spoil(tmp_path, {2}, run__name="ended", train__precision="fp16")
    train(ended)
    facts = start(tiny(tmp_path, "ended", train__precision="fp16"), ONE)
    train(facts)  # nothing left to do: it only restores
    assert facts.strategy.facts() == ended.strategy.facts()
    assert facts.strategy.facts()["loss_scale"]["value"] == 32768.0


def test_8_bit_state_learns_like_adamw_and_resumes_exactly(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    runs = {}
    for name, optimizer in (("exact", "adamw"), ("small", "adamw8bit")):
        job = start(tiny(tmp_path, name, optim__optimizer=optimizer), ONE)
        train(job)
        runs[name] = [line["loss"] for line in read_lines(job.folder / "metrics.jsonl")]
    assert runs["small"] != runs["exact"]
    assert runs["small"] == pytest.approx(runs["exact"], rel=0.05)
    config = tiny(tmp_path, "again", optim__optimizer="adamw8bit")
    job = start(config, ONE)
    job.signal = iter([0] * 5 + [2] * 20).__next__
    assert train(job) < 12
    train(start(config, ONE))
    again = [line["loss"] for line in read_lines(job.folder / "metrics.jsonl")]
    assert again == runs["small"]
