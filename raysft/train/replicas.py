"""parallel.replicate: how many copies of a model there are, each sharded over workers of its own.

Shards travel for every layer of every turn: fast between the GPUs of a node, slowly between nodes.
Where the GPUs of one node hold all of it, each node gets a copy, and only gradients travel between
nodes, once each has its share of them.

`auto` follows from what does not change while a run lasts: the workers of each node, what the model
takes by `estimate`, and the size (not the load) of the smallest GPU. The same workers thus choose
the same again, and others may choose otherwise: checkpoints fit either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from raysft.config.schema import Config
from raysft.config.strategies import traits_of
from raysft.models.base import SpeechModel
from raysft.parallel import World
from raysft.train.estimate import Estimate, estimate

# Of a GPU's memory. Of the state alone too, for a budget that is being looked for
# (data.tokens_per_batch: auto) has no activations yet: what it finds with copies then holds for the
# run, and a run never makes copies that the search has not made.
STATE, ALL = 0.5, 0.72


@dataclass(frozen=True)
class Copies:
    """How many copies of the model there are, and why, for people."""

    number: int
    why: str

    def describe(self, workers: int) -> str:
        """In a line: what `workers` workers hold."""
        if self.number == 1:
            return f"one copy of the model, sharded over all {workers} workers ({self.why})"
        return (
            f"{self.number} copies of the model, each sharded over {workers // self.number} "
            f"workers ({self.why})"
        )


def choose(nodes: Sequence[Hashable], found: Estimate, memory: float | None) -> Copies:
    """What `parallel.replicate: auto` is. nodes: that of each worker. memory: bytes of the smallest
    GPU; None: workers compute on CPUs."""
    counts = Counter(nodes)
    each = len(nodes) // max(1, len(counts))
    if len(counts) < 2:
        return Copies(1, "auto: all are on one node")
    if memory is None:
        return Copies(1, "auto: on CPUs")
    if set(counts.values()) != {each}:
        numbers = ", ".join(map(str, sorted(counts.values())))
        return Copies(1, f"auto: nodes have unequal numbers of workers: {numbers}")
    if each == 1:
        return Copies(1, "auto: a node has one worker")
    state = found.state(each)
    whole = state + found.activations
    said = (
        f"a GPU of {memory / 1e9:.1f} GB, with all of it on the {each} of a node, would hold "
        f"{state / 1e9:.1f} GB of state and {found.activations / 1e9:.1f} GB of activations"
    )
    if state > STATE * memory or whole > ALL * memory:
        return Copies(1, f"auto: too large for one node: {said}")
    return Copies(len(counts), f"auto: one node has room: {said}")


def decide(
    config: Config, found: Estimate, nodes: Sequence[Hashable], memory: float | None
) -> Copies:
    """What `parallel.replicate` is, of a strategy that has copies; see `choose`."""
    asked = config.parallel.replicate
    if asked != "auto":
        return Copies(asked, "as set")
    if config.parallel.offload == "parameters":
        return Copies(1, "auto: parallel.offload: a node's host memory would hold all of it")
    return choose(nodes, found, memory)


def settled(
    config: Config, speech_model: SpeechModel, world: World
) -> tuple[Config, Copies | None]:
    """`config` with a number for `parallel.replicate: auto`, and what was chosen; None where the
    strategy has no copies, or a number is there already. A collective."""
    traits = traits_of(config.parallel.strategy)
    if not traits.replicates or config.parallel.replicate != "auto":
        return config, None
    sizes = world.gather(device_bytes(world.device))
    on_gpus = [size for size in sizes if size is not None]
    memory = min(on_gpus) if len(on_gpus) == world.size else None
    found = decide(config, estimate(config, speech_model, world.size), world.nodes(), memory)
    return with_copies(config, found.number), found


def with_copies(config: Config, number: int) -> Config:
    """`config` with that many copies of the model."""
    parallel = config.parallel.model_copy(update={"replicate": number})
    return config.model_copy(update={"parallel": parallel})


def device_bytes(device: torch.device) -> float | None:
    """Of a GPU, in use or not; None: of a CPU, whose memory others share."""
    if device.type != "cuda":
        return None
    return float(torch.cuda.get_device_properties(device).total_memory)
