"""What two processes (and then one, and three) do under ZeRO, for unit/parallel/test_zero.py."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn

from raysft.config import Config
from raysft.losses import chunked as losses
from raysft.parallel import Strategy, World, make_strategy, zero_state
from raysft.parallel.ddp import Ddp
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support import worlds

LANES, STEPS, CLIP = 3, 10, 0.05
STAGES = ("zero1", "zero2", "zero3")
IDLE = ("ddp", "fsdp", *STAGES)
Batch = dict[str, torch.Tensor]
Reference = tuple[list[list[float]], dict[str, torch.Tensor]]


class Net(nn.Module):
    """Odd sizes, so that shards are uneven; tied weights; buffers that are saved or not; `base`
    is what some tests freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.base = nn.Linear(7, 7)
        self.wide = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.narrow = nn.Linear(13, 7, bias=False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.arange(3.0) + 0.1)
        self.register_buffer("derived", torch.arange(3.0), persistent=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the targets."""
        hidden = self.embed(batch["ids"])
        hidden = hidden + self.base(hidden)
        hidden = hidden + self.narrow(F.gelu(self.norm(self.wide(hidden))))
        logits = self.head(hidden).float()
        loss = F.cross_entropy(logits, batch["targets"], reduction="none")
        return (loss * batch["weights"]).sum()


class Mixture(nn.Module):
    """Experts that are modules of their own; a whole batch goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(7, 7) for _ in range(4))

    def forward(self, hidden: torch.Tensor, chosen: int) -> torch.Tensor:
        found: torch.Tensor = self.experts[chosen](hidden)
        return found


class Sparse(nn.Module):
    """Lanes of different lengths choose different experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.norm = nn.LayerNorm(7)
        self.mixture = Mixture()
        self.head = nn.Linear(7, 11, bias=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the targets."""
        hidden = self.norm(self.embed(batch["ids"]))
        logits = self.head(hidden + self.mixture(hidden, len(batch["ids"]) % 4)).float()
        loss = F.cross_entropy(logits, batch["targets"], reduction="none")
        return (loss * batch["weights"]).sum()


def sparse() -> Sparse:
    torch.manual_seed(0)
    return Sparse()


def net(freeze: bool = False) -> Net:
    torch.manual_seed(0)
    module = Net()
    module.base.requires_grad_(not freeze)
    return module


def make_config(strategy: str, **changes: Any) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "parallel": {"strategy": strategy},
        "optim": {
            "lr": 3e-2,
            "weight_decay": 0.1,
            "clip": CLIP,
            "groups": [{"match": ["*norm*"], "lr": 1e-2}],
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return Config.model_validate(tree)


def lane(step: int, number: int, tokens: int = 5) -> Batch:
    """A micro-batch; lanes differ in size."""
    source = torch.Generator().manual_seed(100 * step + number)
    count = tokens + number
    drawn = torch.randint(0, 11, (2, count), generator=source)
    return {"ids": drawn[0], "targets": drawn[1], "weights": torch.ones(count)}


def rate(step: int) -> float:
    return min(1.0, step / 4)


def take_step(strategy: Strategy, world: World, step: int, factor: float = 1.0) -> tuple[Any, ...]:
    """(loss, norm, skipped) of one step of LANES lanes; a worker without a lane for its last turn
    takes an empty one."""
    tokens = sum(len(lane(step, number)["ids"]) for number in range(LANES))
    total = torch.zeros((), dtype=torch.float64)
    turns = range(world.turns(LANES))
    for turn in turns:
        number = world.rank + turn * world.size
        batch = lane(step, min(number, LANES - 1))
        batch["weights"] = batch["weights"] * (factor if number < LANES else 0.0)
        with strategy.accumulate(last=turn == turns[-1]):
            with strategy.autocast():
                loss = strategy.module(batch)
            strategy.backward(loss * (world.size / tokens))
        total += loss.detach()
    found = strategy.step(rate(step))
    return world.sum_tensor(total).item() / tokens, found.norm, found.skipped


def plain(freeze: bool = False, module: nn.Module | None = None, steps: int = STEPS) -> Reference:
    """[[loss, norm], ...] and weights after some steps of plain torch in one process. module:
    another than `net`."""
    module = module or net(freeze)
    groups = [
        {"params": [p for n, p in module.named_parameters() if keep(n, p)], **settings}
        for keep, settings in (
            (lambda n, p: "norm" in n, {"lr": 1e-2, "weight_decay": 0.0}),
            (lambda n, p: "norm" not in n and p.ndim == 1, {"lr": 3e-2, "weight_decay": 0.0}),
            (lambda n, p: p.ndim == 2, {"lr": 3e-2, "weight_decay": 0.1}),
        )
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=False)
    peaks = [group["lr"] for group in adamw.param_groups]
    lines = []
    for step in range(1, steps + 1):
        batches = [lane(step, number) for number in range(LANES)]
        tokens = sum(len(batch["ids"]) for batch in batches)
        loss = sum(module(batch) for batch in batches) / tokens
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        for group, peak in zip(adamw.param_groups, peaks, strict=True):
            group["lr"] = peak * rate(step)
        adamw.step()
        adamw.zero_grad()
        lines.append([loss.item(), norm.item()])
    return lines, {k: v.clone() for k, v in module.state_dict().items()}


# -- what the two processes do ------------------------------------------------------------------


def whole_state(strategy: Strategy, world: World) -> dict[str, Any]:
    """The state of all workers, flat; under ZeRO every tensor has to come from exactly one."""
    found: dict[str, Any] = {}
    parts = world.gather(strategy.state())
    for part in parts[:1] if isinstance(strategy, Ddp) else parts:
        for name, tensor in part.get("model", {}).items():
            assert f"model.{name}" not in found, f"two workers write {name}"
            found[f"model.{name}"] = tensor
        for name, state in part.get("optim", {}).items():
            for key, tensor in state.items():
                assert f"optim.{name}.{key}" not in found
                found[f"optim.{name}.{key}"] = tensor
    return found


def training(world: World, folder: Path, strategy: str, **changes: Any) -> dict[str, Any]:
    """STEPS steps from the start; the state before and after them."""
    freeze = changes.pop("freeze", False)
    made = make_strategy(make_config(strategy, **changes), net(freeze), world)
    before = {} if strategy == "ddp" else whole_state(made, world)
    lines = [take_step(made, world, step) for step in range(1, STEPS + 1)]
    return {"lines": lines, "before": before, "after": whole_state(made, world)}


def sharded(folder: Path) -> str:
    """A JSON under which zero3 shards small parameters too, and keeps none that it gathered."""
    path = folder / f"sharded_{os.getpid()}.json"  # its own: all processes write at once
    keys = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    path.write_text(json.dumps({"zero_optimization": {f"stage3_{key}": 0 for key in keys}}))
    return str(path)


def disturbed(world: World, folder: Path, strategy: str, **changes: Any) -> dict[str, Any]:
    """A step that is NaN on one worker, and one that is dropped, between others."""
    made = make_strategy(make_config(strategy, **changes), net(), world)
    lines = [take_step(made, world, step) for step in (1, 2)]
    before, facts = whole_state(made, world), made.facts()
    found = {"nan": take_step(made, world, 3, math.nan if world.rank == 1 else 1.0)}
    found |= {"before": before, "after_nan": whole_state(made, world), "facts": facts}
    found["facts_after_nan"] = made.facts()
    for last in (False, True):
        with made.accumulate(last):
            made.backward(made.module(lane(9, 0)))
    made.drop()
    found["after_drop"], found["facts_after_drop"] = whole_state(made, world), made.facts()
    lines += [take_step(made, world, step) for step in range(3, STEPS + 1)]
    return {**found, "lines": lines}


def handed_over(world: World, folder: Path, *strategies: str) -> dict[str, Any]:
    """Two steps under each strategy in turn, from one checkpoint to the next."""
    lines, step, path = [], 0, None
    for number, strategy in enumerate(strategies):
        made = make_strategy(make_config(strategy), net(), world)
        if path is not None:
            made.load(lambda state, path=path: dcp.load(state, checkpoint_id=path))
        for _ in range(2):
            step += 1
            lines.append(take_step(made, world, step))
        path = folder / f"{'_'.join(strategies)}_{number}"
        dcp.save({**made.state(), "more": {}}, checkpoint_id=path)
    return {"lines": lines}


def resumed(world: World, folder: Path, strategy: str, **changes: Any) -> dict[str, Any]:
    """As `training`, but in the middle all is loaded into a new engine."""
    config = make_config(strategy, **changes)
    made = make_strategy(config, net(), world)
    lines = [take_step(made, world, step) for step in range(1, 6)]
    path, facts = folder / "_".join(["resumed", strategy, *changes]), made.facts()
    dcp.save(made.state(), checkpoint_id=path)
    made = make_strategy(config, net(), world)
    made.load(lambda state: dcp.load(state, checkpoint_id=path))
    made.load_facts(facts)
    lines += [take_step(made, world, step) for step in range(6, STEPS + 1)]
    return {"lines": lines, "after": whole_state(made, world)}


def idle_experts(world: World, folder: Path, strategy: str) -> dict[str, Any]:
    """Each worker calls other experts than its neighbour."""
    more = {"parallel__deepspeed": sharded(folder)} if strategy == "zero3" else {}
    made = make_strategy(make_config(strategy, **more), sparse(), world)
    return {"lines": [take_step(made, world, step) for step in range(1, 4)]}


# Workers -> the steps that they do, one world after the other.
SIZES = {2: range(1, 5), 1: range(5, 8), 3: range(8, STEPS + 1)}


def resized(world: World, folder: Path, strategy: str) -> dict[str, Any]:
    """The steps of this size of the world, from the checkpoint of the size before."""
    made = make_strategy(make_config(strategy), net(), world)
    before = folder / f"resized_{strategy}_{SIZES[world.size].start - 1}"
    if before.exists():
        made.load(lambda state: dcp.load(state, checkpoint_id=before))
    lines = [take_step(made, world, step) for step in SIZES[world.size]]
    dcp.save(made.state(), checkpoint_id=folder / f"resized_{strategy}_{SIZES[world.size][-1]}")
    return {"lines": lines}


def new_rows(world: World, folder: Path, strategy: str) -> dict[str, Any]:
    """A run whose head has rows of new tokens (a part of its own), and workers with different
    numbers of rows to compute losses of, a few at a time."""
    changes: dict[str, Any] = {"parallel__strategy": strategy}
    if strategy == "zero3":
        changes["parallel__deepspeed"] = sharded(folder)
    if world.is_main:
        worlds.tiny(folder)  # writes the corpus
    world.barrier()
    config = worlds.tiny(
        folder,
        f"new_rows_{strategy}",
        data__lanes=3,
        train__max_steps=3,
        peft__method="lora",
        peft__r=4,
        **changes,
    )
    rows, losses.CHUNK_BYTES = losses.CHUNK_BYTES, {"cpu": 5000, "cuda": 5000}
    try:
        train(worlds.start(config, world))
    finally:
        losses.CHUNK_BYTES = rows
    lines = read_lines(folder / "runs" / config.run.name / "metrics.jsonl")
    return {"lines": [[line["loss"], line["grad_norm"]] for line in lines]}


def weights_only(world: World, folder: Path) -> dict[str, Any]:
    """The weights of a checkpoint, with an optimizer that begins anew."""
    first = make_strategy(make_config("zero3"), net(), world)
    take_step(first, world, 1)
    saved = whole_state(first, world)
    path = folder / "weights_only"
    dcp.save(first.state(), checkpoint_id=path)
    found = {}
    for strategy in STAGES:
        made = make_strategy(make_config(strategy), net(), world)
        made.load(lambda state: dcp.load(state, checkpoint_id=path), weights_only=True)
        found[strategy] = whole_state(made, world)
    return {"saved": saved, "found": found}


SCENARIOS: dict[str, Callable[[World, Path], dict[str, Any]]] = {
    **{s: lambda w, f, s=s: training(w, f, s) for s in STAGES},
    **{f"frozen {s}": lambda w, f, s=s: training(w, f, s, freeze=True) for s in STAGES},
    **{
        f"adapters {s}": lambda w, f, s=s: training(w, f, s, freeze=True, peft__method="lora")
        for s in STAGES
    },
    **{
        f"{offload} {s}": lambda w, f, s=s, o=offload: training(w, f, s, parallel__offload=o)
        for s, offload in [*((s, "optimizer") for s in STAGES), ("zero3", "parameters")]
    },
    **{
        f"{half} {s}": lambda w, f, s=s, h=half: training(w, f, s, train__precision=h)
        for s in ("ddp", *STAGES)
        for half in ("bf16", "fp16")
    },
    **{
        f"disturbed {precision} {s}": lambda w, f, s=s, p=precision: disturbed(
            w, f, s, train__precision=p
        )
        for s in STAGES
        for precision in ("fp32", "bf16", "fp16")
    },
    **{
        f"disturbed offload {s}": lambda w, f, s=s: disturbed(
            w, f, s, parallel__offload="optimizer"
        )
        for s in STAGES
    },
    **{f"resumed {s}": lambda w, f, s=s: resumed(w, f, s) for s in STAGES},
    **{
        f"resumed bf16 {s}": lambda w, f, s=s: resumed(w, f, s, train__precision="bf16")
        for s in STAGES
    },
    **{
        f"resumed optimizer {s}": lambda w, f, s=s: resumed(w, f, s, parallel__offload="optimizer")
        for s in STAGES
    },
    "sharded zero3": lambda w, f: training(w, f, "zero3", parallel__deepspeed=sharded(f)),
    "handed over": lambda w, f: handed_over(w, f, "ddp", "zero1", "zero3", "zero2", "fsdp"),
    "handed back": lambda w, f: handed_over(w, f, "fsdp", "zero2", "zero1", "ddp", "zero3"),
    "weights only": weights_only,
    **{f"idle experts {s}": lambda w, f, s=s: idle_experts(w, f, s) for s in IDLE},
    **{f"new rows {s}": lambda w, f, s=s: new_rows(w, f, s) for s in ("ddp", "zero3")},
    **{f"resized {s}": lambda w, f, s=s: resized(w, f, s) for s in STAGES},
}


# Further kinds of what the other scenarios show, for `make test-all`.
SLOW = (
    *("adapters", "fp16", "disturbed fp16", "disturbed bf16", "disturbed offload"),
    *("resumed bf16", "resumed optimizer"),
)


def is_slow(name: str) -> bool:
    """Whether only slow tests ask for a scenario."""
    return name.startswith(SLOW)


def allow_fp16() -> None:
    """DeepSpeed asks for a CPU that computes fast in float16; torch computes on any."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def work(rank: int, size: int, slow: bool, folder: Path) -> None:
    """One of the processes: of two, which go through all scenarios of a kind, or of others."""
    torch.set_num_threads(1)
    allow_fp16()
    zero_state.CHUNK_BYTES = 1000
    store = f"file://{folder}/store_{size}_{slow}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    world = World.current()
    for name, scenario in SCENARIOS.items():
        if is_slow(name) is slow and (size == 2 or name.startswith("resized")):
            found = scenario(world, folder)
            if world.is_main:
                torch.save(found, folder / f"{name}_{size}.pt")
    dist.barrier()
    dist.destroy_process_group()
