"""What a worker needs to train, and what the loop asks of those who give it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from raysft.config.schema import Config
from raysft.json_types import JsonObject
from raysft.models.routing import Routing
from raysft.parallel import Strategy, World
from raysft.run.catalogue import Catalogue, Saved
from raysft.run.evaluations import Made, Measure
from raysft.run.ownership import Lease
from raysft.train.flops import Cost
from raysft.train.step import StepBatch


class Stream(Protocol):
    """Ready step batches of this worker, in order, from a cursor on."""

    def open(self, cursor: JsonObject | None) -> Iterator[StepBatch]: ...

    def close(self) -> None: ...


class AdapterState(Protocol):
    """State of adapters beside their weights (the ranks of AdaLoRA), and what is made of them."""

    def after_step(self, step: int) -> None:
        """After the weights have moved, while their gradients are still there."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """State to save, and to be filled on loading; the same on every worker."""
        ...

    def facts(self) -> JsonObject:
        """The rest of the state, as JSON."""
        ...

    def load_facts(self, facts: JsonObject) -> None:
        """The inverse of `facts`."""
        ...

    def files(self, weights: dict[str, torch.Tensor]) -> dict[str, bytes]:
        """An adapter of these weights in peft's layout: path -> content."""
        ...


class Evaluate(Protocol):
    """Evaluation of the model as it is. final: of all examples, not the share that is looked at
    while training."""

    def measure(self, final: bool) -> Measure:
        """What an evaluation would measure; the same on every worker."""
        ...

    def __call__(
        self,
        final: bool,
        predictions: Path | None = None,
        seen: Callable[[int, int], None] = ...,
        tell: Callable[[str], None] = ...,
    ) -> dict[str, float]:
        """Figures by name. A collective.

        predictions: file for every reference and hypothesis. seen: called before each
        round of batches with how many are done and how many there are. tell: given, on rank 0,
        what the user should know of the figures.
        """
        ...


class Objective(Protocol):
    """What a step learns where that is not right answers as they are planned.

    updates: steps of the optimizer that are made of a batch.
    """

    updates: int

    def prepared(self, batch: StepBatch, beat: Callable[[str], None]) -> StepBatch:
        """What is to be trained on in place of `batch`. A collective. beat: told what is being
        done, whenever there is progress."""
        ...

    def figures(self, counts: Mapping[str, float]) -> dict[str, float]:
        """For metrics.jsonl, of the counts of some steps."""
        ...


class Beside(Protocol):
    """Evaluations that are made beside training, as rank 0 has them."""

    def ready(self) -> int:
        """How many are there to be recorded, as of a moment ago, without waiting."""
        ...

    def made(self) -> list[Made]:
        """Those."""
        ...

    def recorded(self, step: int) -> None:
        """That of `step` is in the run's files, or of no use to them."""
        ...

    def end(self, waiting: Callable[[], None]) -> None:
        """Have no more made; calls `waiting` until that is so."""
        ...


@dataclass
class Job:
    """What a worker needs to train, whoever built it.

    signal: rank 0's is asked before every step, see `monitor`. weights: a checkpoint to begin with
        where the run has none. extras: files that every checkpoint carries. start: facts for the
        first event of this start. hung: told why, before a worker that makes no progress ends its
        process; None: never ends it. adapters: what `peft.method` trains, None for all weights.
    routing: of a mixture whose routers are known. objective: None: right answers.
    cost: FLOPs of what is counted, for the metrics; None: not known. submitted: when this start was
        asked for (time.time()), where it is the first of a submission: until then the run was idle.
    until: a step at which it saves and leaves, evaluated where that is due; 0: the last one.
    identity: what tells this run from others: where the ledger's chains begin, and what each of its
        checkpoints names; "": nobody asks.
    beside: on rank 0, where evaluations are made beside training; None: of each due step those
        that are left are made at the end.
    lease: the driver's, with this group's number; None: there is no driver, and rank 0 owns the run
        while it trains.
    """

    config: Config
    folder: Path
    world: World
    strategy: Strategy
    stream: Stream
    tasks: list[str]
    total_steps: int
    examples: int  # in the index and rejected from it: what max_quarantined is a share of
    catalogue: Catalogue
    evaluate: Evaluate | None = None
    progress: Callable[[JsonObject], None] | None = None
    signal: Callable[[], int] = lambda: 0
    weights: Saved | None = None
    adapters: AdapterState | None = None
    beside: Beside | None = None
    objective: Objective | None = None
    cost: Cost | None = None
    routing: Routing | None = None
    extras: dict[str, bytes] = field(default_factory=dict)
    start: JsonObject = field(default_factory=dict)
    submitted: float | None = None
    until: int = 0
    identity: str = ""
    lease: Lease | None = None
    hung: Callable[[str], None] | None = None

    def after_step(self, step: int) -> None:
        """What adapters do between two steps, with the gradients of the first."""
        if self.adapters is not None:
            self.adapters.after_step(step)
