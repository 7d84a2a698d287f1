"""The values of `parallel.strategy`, as data: what each shares among workers, and what it refuses.

Who asks what a strategy does asks its row here; who trains asks `parallel.make` for its class.
Nothing here imports torch. `register` puts in a strategy from outside.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from raysft.errors import UserError

Part = Literal["weights", "gradients", "moments", "experts"]
Offload = Literal["optimizer", "parameters"]


@dataclass(frozen=True)
class Refusal:
    """A value of a key that a strategy cannot work with. why: the reason, with the remedy."""

    key: str
    value: object
    why: str


@dataclass(frozen=True)
class StrategyTraits:
    """What is known of a strategy before it is built.

    shards: what workers share; of everything else each has all. offloads: the values of
    `parallel.offload` it goes with. synced: its forward pass is a collective: each worker has to
    enter it as often as the others. replicates: goes with `parallel.replicate`, which is a
    number by the time it is built. turns: with
    `parallel.gradients`. reads: takes a model whose matrices it reads itself when it shards them
    (`parallel.unread`). stage: of DeepSpeed's ZeRO; None: it is not DeepSpeed's. implementation:
    "module:Class" of its class, made of (config, module, world); `register` may be told it beside
    the row.
    """

    name: str
    shards: tuple[Part, ...] = ()
    offloads: tuple[Offload, ...] = ()
    synced: bool = False
    replicates: bool = False
    turns: bool = False
    reads: bool = False
    stage: int | None = None
    refuses: tuple[Refusal, ...] = ()
    implementation: str | None = None


def _zero(
    stage: int, shards: tuple[Part, ...], offloads: tuple[Offload, ...], synced: bool = False
) -> StrategyTraits:
    """The row of a stage of DeepSpeed's ZeRO."""
    name = f"zero{stage}"
    refuses = (
        Refusal("train.compile", True, f"the hooks of {name} break what is compiled; use {_TORCH}"),
        Refusal(
            "peft.method",
            "adalora",
            f"adalora ranks by whole gradients, which {name} does not keep; "
            f"use parallel.strategy: {_TORCH}",
        ),
        _no_qlora(name),
        Refusal(
            "optim.optimizer",
            "adamw8bit",
            f"adamw8bit cannot be partitioned by {name}; use {_TORCH}, or adamw",
        ),
    )
    return StrategyTraits(
        name,
        shards,
        offloads,
        synced,
        reads="weights" in shards,
        stage=stage,
        refuses=refuses,
        implementation="raysft.parallel.zero:Zero",
    )


def _no_qlora(name: str) -> Refusal:
    return Refusal(
        "peft.method",
        "qlora",
        f"qlora keeps its base in 4 bits, which {name} cannot shard; "
        "use parallel.strategy: ddp, or peft.method: lora",
    )


_TORCH = "ddp or fsdp"
WHOLE_BYTES = 4 * 2**30  # of a gradient that parallel.gradients: auto keeps whole
_ALL: tuple[Part, ...] = ("weights", "gradients", "moments")
_ROWS = (
    StrategyTraits("ddp", implementation="raysft.parallel.ddp:Ddp"),
    StrategyTraits(
        "fsdp",
        _ALL,
        ("parameters",),
        synced=True,
        replicates=True,
        turns=True,
        reads=True,
        refuses=(_no_qlora("fsdp"),),
        implementation="raysft.parallel.fsdp:Fsdp",
    ),
    _zero(1, ("moments",), ("optimizer",)),
    _zero(2, ("gradients", "moments"), ("optimizer",)),
    _zero(3, _ALL, ("optimizer", "parameters"), synced=True),
    StrategyTraits(
        "ep",
        (*_ALL, "experts"),
        synced=True,
        turns=True,
        reads=True,
        refuses=(
            _no_qlora("ep"),
            Refusal(
                "optim.optimizer",
                "adamw8bit",
                "adamw8bit keeps no plain tensors, which ep shares; use fsdp, or adamw",
            ),
            Refusal(
                "train.compile",
                True,
                "the exchange of tokens is not compiled; use fsdp, or leave compile out",
            ),
        ),
        implementation="raysft.parallel.ep:Ep",
    ),
)
STRATEGIES: dict[str, StrategyTraits] = {row.name: row for row in _ROWS}


def traits_of(name: str) -> StrategyTraits:
    """The row of a value of `parallel.strategy`. Raises UserError, naming the nearest."""
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"parallel.strategy: unknown strategy {name!r}{meant} (there are "
            f"{', '.join(STRATEGIES)})"
        )
    return STRATEGIES[name]


def gradients_of(asked: Literal["auto", "whole", "sharded"], trained: int) -> str:
    """What a worker holds of a gradient between turns, where the strategy goes with the key.

    trained: parameters, whose gradient takes 4 bytes each. The same on every machine, for it
    decides in which order is added up.
    """
    if asked != "auto":
        return asked
    return "whole" if 4 * trained <= WHOLE_BYTES else "sharded"


def choices() -> list[str]:
    """What `parallel.strategy` takes."""
    return list(STRATEGIES)


def names(fits: Callable[[StrategyTraits], bool]) -> list[str]:
    """The strategies whose row is as asked, in the order of the table."""
    return [name for name, traits in STRATEGIES.items() if fits(traits)]


def register(traits: StrategyTraits, implementation: str | None = None) -> None:
    """Put a row into the table, in every process that reads the config or trains.

    implementation: that of the row, where it has none itself. Raises UserError where another row
    has its name.
    """
    if STRATEGIES.get(traits.name) is traits:
        return
    if implementation is not None:
        traits = replace(traits, implementation=implementation)
    if traits.name in STRATEGIES:
        raise UserError(f"strategy {traits.name!r} is there already")
    STRATEGIES[traits.name] = traits
