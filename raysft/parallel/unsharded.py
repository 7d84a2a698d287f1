"""All sharded weights of FSDP2 whole on every worker at once, for as long as nothing trains.

Evaluation generates token by token: gathered block by block, the whole model would travel for every
token of the slowest answer. Where it fits into every worker's memory it travels once, in what it
computes in, and workers answer at their own pace.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from raysft.parallel.world import World

SHARE = 0.7  # of the memory that is free; the rest is for what generation keeps
MARK = "raysft_whole"  # attribute of a module whose weights stay whole
_KEPT = "raysft_kept"  # of one whose weights always do, from its forward pass to its backward pass


def keep(parts: Iterable[nn.Module], kept: bool) -> None:
    """Remember of sharded modules whether they were made so that their weights stay whole after a
    forward pass."""
    for part in parts:
        setattr(part, _KEPT, kept)


def begin(module: FSDPModule) -> None:
    """Make `module` the root of all that is sharded in it, as its first forward pass would: else a
    part that runs by itself before takes itself for one."""
    module._get_fsdp_state()._lazy_init()


@contextmanager
def unsharded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Around passes without gradients: no parameter of those of `modules` that are sharded is
    gathered meanwhile, but for what is in other sharded modules within them."""
    parts = [part for part in modules if isinstance(part, FSDPModule)]
    freed = [part for part in parts if not getattr(part, _KEPT, False)]
    try:
        for part in freed:
            part.set_reshard_after_forward(False, recurse=False)
        for part in parts:
            part.unshard()
            setattr(part, MARK, True)
        yield
    finally:
        for part in freed:
            part.set_reshard_after_forward(True, recurse=False)
        for part in parts:
            part.reshard()
            setattr(part, MARK, False)


def stays_whole(part: nn.Module) -> bool:
    """Whether a sharded module needs no collective to run just now."""
    return getattr(part, MARK, False) is True


def fits(module: FSDPModule, half: torch.dtype | None, world: World) -> bool:
    """Whether the weights of `module` fit as a whole beside what every worker has. A collective."""
    width = half.itemsize if half is not None else 0
    need = sum(
        p.numel() * (width or p.element_size()) for p in cast(nn.Module, module).parameters()
    )
    return all(world.gather(need <= SHARE * free_bytes(world.device)))


def free_bytes(device: torch.device) -> float:
    """Of the GPU, with what torch holds and does not use; else of the host's, a worker's share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + unused)
    found = Path("/proc/meminfo")
    if not found.exists():
        return 0.0
    text = found.read_text(encoding="utf-8").partition("MemAvailable:")[2].split()
    return 1024.0 * int(text[0]) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
