"""Runs whose answers are rewarded: a corpus of prompts, and rewards that random models earn."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raysft.config.rewards import Reward, register
from raysft.data.facts import Facts
from tests.support import worlds
from tests.support.models import CAUSAL

if TYPE_CHECKING:
    from raysft.train.job import Job

PROMPTS = 48


def early(answer: str, facts: Facts) -> float:
    """The share of characters of the first half of ASCII's."""
    return sum(ord(letter) < 64 for letter in answer) / max(1, len(answer))


def first(answer: str, facts: Facts) -> float:
    """1 for an answer that begins as the right one does."""
    return float(answer[:1] == (facts.text or "")[:1])


register(Reward("early", "tests.support.rewarded:early"))
register(Reward("first", "tests.support.rewarded:first"))


def corpus(folder: Path) -> Path:
    """A file of prompts of some lengths, made once."""
    path = folder / "prompts.jsonl"
    if not path.exists():
        records = [
            {
                "id": f"q{number}",
                "task": "chat",
                "messages": [
                    {"role": "user", "content": "rate " + "it " * (number % 5)},
                    {"role": "assistant", "content": "<answer>4</answer>"},
                ],
            }
            for number in range(PROMPTS)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tree(folder: Path, name: str, grpo: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A config: 3 lanes, some prompts a step, answers of at most 6 tokens.
    changes: section__key=value."""
    found: dict[str, Any] = {
        "plugins": ["tests.support.rewarded"],
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "data": {
            "train": [{"path": str(corpus(folder))}],
            "lanes": 3,
            "tokens_per_batch": 130,
            "window": 16,
            "index_path": str(folder / "index"),
        },
        "model": {**CAUSAL},
        "parallel": {"strategy": "ddp"},
        "optim": {"lr": 1e-2},
        "train": {"max_steps": 4, "objective": "grpo"},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 2},
    }
    own = {"rewards": {"early": 1.0}, "group": 4, "max_new_tokens": 6, "beta": 0.1}
    return worlds.changed(found, {**changes, "train__grpo": own | grpo})


def write(folder: Path, name: str, grpo: dict[str, Any], **changes: Any) -> Path:
    """`tree` as a file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree(folder, name, grpo, **changes)))
    return path


def main(size: int, kill_at: int, paths: list[Path]) -> None:
    """A process that `worlds.run` starts: trains each config; in the last one a worker dies within
    a step, while it samples, or, where kill_at < 0, between two updates. kill_at: the step, and
    ten times the worker's rank."""
    import torch.distributed as dist

    from raysft.config import load_config
    from raysft.parallel import World
    from raysft.train.loop import train

    place = f"file://{os.environ['RENDEZVOUS']}"
    dist.init_process_group("gloo", place, rank=int(os.environ["RANK"]), world_size=size)
    for path in paths:
        job = worlds.start(load_config(path, [f"parallel.workers={size}"]), World.current())
        rank, step = divmod(abs(kill_at), 10)
        if path == paths[-1] and job.world.rank == rank and step:
            die_within(job, step, sampling=kill_at > 0)
        train(job)
    dist.barrier()
    dist.destroy_process_group()


def die_within(job: Job, step: int, sampling: bool) -> None:
    """Kill this process in a step of `job`: at its third sampled token, or its second update."""
    objective: Any = job.objective
    prepared, move = objective.prepared, job.strategy.step
    calls: list[str] = []

    def count(kind: str, most: int) -> None:
        calls.append(kind)
        if calls.count(kind) == most:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(batch: Any, beat: Any) -> Any:
        calls.clear()
        calls.append(f"in {batch.step}")
        if sampling and batch.step == step:
            return prepared(batch, lambda doing: count("token", 3))
        return prepared(batch, beat)

    def moved(*args: Any) -> Any:
        if not sampling and f"in {step}" in calls:
            count("update", 2)
        return move(*args)

    objective.prepared, job.strategy.step = watched, moved  # type: ignore[method-assign]
