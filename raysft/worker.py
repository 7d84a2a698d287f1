"""What one training worker does: build the model, join the stream, train, evaluate.

Called by `launch` in every Ray Train worker at every (re)start, with readers of Ray Data. Runs
without Ray too: tests and benchmarks give it readers in their own process (`Data.in_process`).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysft import models
from raysft.config import Config
from raysft.data.encode import Encoder
from raysft.data.example import MicroBatch
from raysft.data.index import Index
from raysft.data.plan import Plan
from raysft.data.read import Reader, Work
from raysft.evaluate.run import Corpus, evaluate
from raysft.models.base import Adapter
from raysft.parallel import World, make_strategy
from raysft.train import checkpoint
from raysft.train.feed import Feed
from raysft.train.loop import Job
from raysft.train.metrics import Lines

Progress = Callable[[dict[str, Any]], None]
Read = Callable[[Iterator[Work]], Iterator[MicroBatch]]


@dataclass
class Data:
    """Indexes and how to read from them."""

    train: Index
    eval: Index | None
    encoder: Encoder
    read_train: Read
    read_eval: Read | None

    @classmethod
    def in_process(
        cls, config: Config, encoder: Encoder, train: Index, evaluation: Index | None
    ) -> Data:
        """Read in this process, without Ray."""
        budget = config.data.tokens_per_batch
        read_eval = None
        if evaluation is not None:
            read_eval = Reader(evaluation, encoder, config.evaluate.tokens_per_batch, None).read
        reader = Reader(train, encoder, budget, config.run.seed)
        return cls(train, evaluation, encoder, reader.read, read_eval)


def build_job(
    config: Config,
    folder: Path,
    world: World,
    data: Data,
    total_steps: int,
    progress: Progress | None = None,
) -> Job:
    """Model, strategy, plan and feed of one worker."""
    adapter = models.build(config.model, config.data, data.encoder, config.run.seed)
    adapter.tasks[:] = data.train.tasks
    if config.train.freeze:
        adapter.freeze(config.train.freeze)
    if config.train.gradient_checkpointing:
        adapter.enable_gradient_checkpointing()
    strategy = make_strategy(config.parallel.strategy, adapter.supervised, world)
    plan = Plan.of(data.train, config.data, config.run.seed)
    settings = config.data
    feed = Feed(
        plan, settings.lanes, adapter, data.read_train, world, total_steps, settings.prefetch
    )
    return Job(
        config=config,
        folder=folder,
        world=world,
        strategy=strategy,
        stream=feed,
        tasks=list(data.train.tasks),
        total_steps=total_steps,
        examples=len(data.train) + len(data.train.rejected),
        evaluate=partial(_evaluate, config, folder, world, data, adapter, strategy)
        if data.eval is not None
        else None,
        progress=progress if world.is_main else None,
    )


def evaluate_checkpoint(job: Job) -> dict[str, float]:
    """Evaluate the newest checkpoint on all of data.eval; appends a line to eval.jsonl."""
    found = checkpoint.latest(job.folder)
    assert found is not None and job.evaluate is not None  # checked by the job's entry
    checkpoint.load_weights(found, job.strategy.module)
    job.strategy.module.eval()
    step = checkpoint.read_meta(found)["step"]
    values = job.evaluate(step, True)
    if job.world.is_main:
        lines = Lines(job.folder / "eval.jsonl")
        lines.write({"step": step, **values})
        lines.close()
    return values


def _evaluate(
    config: Config,
    folder: Path,
    world: World,
    data: Data,
    adapter: Adapter,
    strategy: Any,
    step: int,
    final: bool,
) -> dict[str, float]:
    index, read = data.eval, data.read_eval
    assert index is not None and read is not None  # `build_job` sees to it
    names = [name for name, _ in index.sources]

    def references(rows: np.ndarray) -> list[str | None]:
        return [example.text for example in index.examples(rows)]

    def batches(rows: list[np.ndarray]) -> Iterator[MicroBatch]:
        return read(Work(0, number, 0, chosen) for number, chosen in enumerate(rows))

    with strategy.whole():
        return evaluate(
            strategy.module,
            adapter,
            Corpus(index.tokens, index.source, names, references),
            batches,
            config.evaluate,
            world,
            config.train.precision,
            final,
            predictions=folder / "predictions" / f"step_{step}.jsonl",
            synced=config.parallel.strategy == "fsdp",
        )


def device_of(config: Config) -> torch.device:
    if config.parallel.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def quiet() -> None:
    """Keep libraries' remarks about their own internals out of the job's log."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is a no-op.*")
